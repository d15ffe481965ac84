"""Exact predictors of worlds with known laws, to stand where the network stands."""
