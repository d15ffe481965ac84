"""Flowception: train and sample video models that insert frames while they denoise."""

__version__ = "0.1.0"
