"""The toy world of bouncing discs with exactly known laws, and scores based on them."""
