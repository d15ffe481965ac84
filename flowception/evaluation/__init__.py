"""Metrics of generated video: exact laws of the toy world, length laws, Fréchet distance."""
