"""Exact predictors for known data laws, used in place of the network."""
