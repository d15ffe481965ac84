"""The toy world of bouncing discs, whose laws are exact, and scores by them."""
