"""Shared fixtures of the sampler tests: predictors in place of the network, and the length-law benchmark."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

FRAME_SHAPE = (2, 3, 2)


@pytest.fixture
def constant_predictor():
    """``make(velocity, rate)``: the same prediction for every frame."""

    def make(velocity=0.0, rate=0.0):
        def predict(state):
            return torch.full_like(state.frames, velocity), torch.full((len(state.frames),), rate, dtype=torch.float64)

        return predict

    return make


@pytest.fixture
def own_frame_predictor():
    """Velocity and rate from a frame's latent, time and clip length, by exactly rounded operations only."""

    def predict(state):
        first = state.frames.flatten(1)[:, 0].double()
        velocity = state.frames * -0.5 + state.condition + state.times.float()[:, None, None, None]
        rate = first.square() + 0.25 * state.clip_frames[state.frame_clip]
        return velocity, rate * (1 - state.clock[state.frame_clip])

    return predict


@pytest.fixture(scope="session")
def length_law():
    """The module ``benchmarks/length_law.py``."""
    path = Path(__file__).parents[2] / "benchmarks" / "length_law.py"
    spec = importlib.util.spec_from_file_location("length_law", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["length_law"] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module
