"""Shard sets of latents: the format, and how sets are written, read, verified, cached, and mixed."""
