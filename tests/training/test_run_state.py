"""The run's state in a checkpoint."""

import pytest

from flowception.errors import CheckpointError
from flowception.training.run_state import RunState


def test_a_state_of_another_version_is_an_error():
    state = RunState()
    state.step = 3
    found = state.to_json()
    assert RunState.from_json(found | {"optimizer_steps": 7}) == state
    for damaged in ({}, {k: v for k, v in found.items() if k != "guard"}, found | {"cursor": {"epic": 0}}):
        with pytest.raises(CheckpointError, match="written by another version"):
            RunState.from_json(damaged)
