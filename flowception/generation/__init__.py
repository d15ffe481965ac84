"""Sampling from a run directory: the network as a predictor, context from files, output videos and growth plots."""
