"""Runs for benchmarks that sample, from the fixtures of the generation tests."""

from tests.generation.conftest import make_run  # noqa: F401  a fixture
