"""Packs: the layout of the token buffer, exact FLOPs, and balancing clips over packs."""
