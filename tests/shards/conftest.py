"""Fixtures of small shard sets and of plan configurations."""

from tests.small_sets import make_config, make_set, make_spec  # noqa: F401
