"""Benchmarks and studies; each writes JSON and a plot or page."""
