"""Runs for the benchmarks that sample, as the tests of generation write them."""

from tests.generation.conftest import make_run  # noqa: F401  a fixture
