"""What a pack is and what it costs: the layout of a token buffer, exact FLOPs, and balancing clips over packs."""
