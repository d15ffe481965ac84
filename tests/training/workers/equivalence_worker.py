"""Worker side of the equivalence tests: the trainer at any stage and world size, and engine weights by step."""

from __future__ import annotations

from tests.training.workers import trainer_worker
from tests.training.workers.small_engine import EMA_DECAY, full, make_engine, train

STEPS = 50
"""Compared."""
CHANGED_AT = 20
"""Step where a run continues with another number of ranks; its warm-up ends at step 30."""
SETTINGS = {
    "packs_per_step": 4,
    "max_steps": STEPS,
    "validation__every_steps": None,
    "checkpoint__save_every_steps": 1000,
    "checkpoint__save_at_start": False,
}
SCHEDULE = {
    "max_steps": CHANGED_AT + STEPS,
    "optim__warmup_steps": 30,
    "optim__lr_schedule": "cosine",
    "optim__weight_decay": 0.1,
}


def stages(folder):
    """50 steps at every ZeRO stage, and the runs that the resumed ones start from and are compared with."""
    for stage in range(4):
        assert trainer_worker.run(folder, f"stage_{stage}", zero__stage=stage, **SETTINGS) is True
    assert trainer_worker.run(folder, "unchanged", **SETTINGS | SCHEDULE) is True
    assert trainer_worker.run(folder, "begun", stop_after=CHANGED_AT - 1, **SETTINGS | SCHEDULE) is False


def alone(folder, name, resumed):
    """The same at this world size at stage 3, and the continued run."""
    assert trainer_worker.run(folder, name, **SETTINGS) is True
    assert trainer_worker.run(folder, resumed, **SETTINGS | SCHEDULE) is True


def weights_by_step(steps):
    """For each stage: the small model's weights after every step, and its final EMA, in full and as lists."""
    found = {}
    for stage in range(4):
        ranks, engine, shards = make_engine(stage)
        weights = [plain(shards, "weight")]
        for step in range(steps):
            train(ranks, engine, shards, [step], ranks.world_size)
            weights.append(plain(shards, "weight"))
        found[str(stage)] = {"weights": weights, "ema": plain(shards, "ema"), "decay": EMA_DECAY}
    return found


def plain(shards, kind):
    return {name: value.double().tolist() for name, value in full(shards, kind).items()}
