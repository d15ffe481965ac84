"""Sampling and training give the network the same inputs: a clip in a given state makes the same pack in both."""

import numpy as np
import pytest
import torch

from flowception import rng
from flowception.data.pack import build_pack
from flowception.data.plan import Plan
from flowception.data.step_plan import Cursor
from flowception.flow import Role, SamplerState
from flowception.generation.predictor import NetworkPredictor
from flowception.shards.index import ClipIndex
from tests.small_sets import configs

STEPS = 1000


class Latents:
    """A reader of synthetic clips: frame j of clip i is drawn from (i, j)."""

    text_width, latent_channels, null_text = None, 12, None

    def read(self, row, frames):
        values = [rng.normals(7, rng.Stream.NOISE, (12, 3, 2), clip=row, frame=int(frame)) for frame in frames]
        return torch.from_numpy(np.stack(values)).bfloat16()

    def read_text(self, row):
        return None

    def read_clip(self, row, frames):
        return self.read(row, frames), self.read_text(row)


def state_of(plan, pack_plan, draws):
    """The sampler state of the same clips by docs/method.md, built frame by frame."""
    frames, condition, roles, ages, counts = [], [], [], [], []
    for slot, row in enumerate(pack_plan.rows.tolist()):
        visible = torch.nonzero(draws.visible[slot]).flatten().tolist()
        counts.append(len(visible))
        for frame in visible:
            clean = Latents().read(row, [frame])[0].float()
            clip = int(plan.index.clips["clip_id"][row])
            noise = torch.from_numpy(
                rng.normals(plan.seed, rng.Stream.NOISE, (12, 3, 2), epoch=pack_plan.epoch, clip=clip, frame=frame)
            )
            role, time = int(draws.roles[slot, frame]), float(draws.frame_time[slot, frame].clamp(0, 1))
            given = role in (Role.CONTEXT_ACTIVE, Role.CONTEXT_PASSIVE)
            shown = time / (time + 3.0 * (1 - time))
            frames.append(clean if given else (1 - shown) * noise + shown * clean)
            condition.append(clean if given else torch.zeros_like(clean))
            roles.append(role)
            ages.append(round(float(draws.global_time[slot].clamp(0, 1)) * STEPS) if given else round(time * STEPS))
    # A state has one clock for all clips, while drawn clips have separate ones, which the test allows for. Just before
    # the clock ends, no clip is skipped as finished.
    step = STEPS - 1
    return SamplerState(
        frames=torch.stack(frames),
        condition=torch.stack(condition),
        roles=torch.tensor(roles),
        cu_frames=torch.tensor([0, *np.cumsum(counts)]),
        born_step=torch.tensor([step - age for age in ages]),
        seeds=torch.arange(len(counts)),
        capped=torch.zeros(len(counts), dtype=torch.bool),
        step=step,
        num_inference_steps=STEPS,
        time_shift=3.0,
    )


@pytest.mark.parametrize("task", ["t2v", "i2v", "v2v", "interpolation", "completion"])
def test_a_training_pack_equals_the_sampling_pack_of_the_same_state(model, task):
    config = configs(
        tasks={task: 1.0}, token_budget=400, packs_per_step=1, num_start_frames=2, time_shift=3.0, condition_dropout=0.0
    )
    labels = np.arange(12) % 3
    index = ClipIndex.from_arrays(frames=6 + np.arange(12) % 4, height=3, width=2, class_label=labels)
    plan = Plan(index, None, *config, model.spec, seed=5)
    (pack_plan,) = plan.step(Cursor(0, 0)).packs
    trained = build_pack(plan, pack_plan, Latents())
    draws = plan.clip_draws(pack_plan).clips
    sampled = NetworkPredictor(model, labels[pack_plan.rows].tolist()).build_pack(state_of(plan, pack_plan, draws))

    tokens, clips, frames = len(sampled.noisy), len(pack_plan.rows), len(sampled.time)
    assert clips > 3
    assert trained.layout.segment_lengths[:clips] == sampled.layout.segment_lengths
    assert torch.equal(trained.layout.token_position[:tokens], sampled.layout.token_position)
    assert torch.equal(trained.class_label[:clips], sampled.class_label)
    assert torch.equal(trained.role[:frames], sampled.role)
    torch.testing.assert_close(trained.condition[:tokens].float(), sampled.condition, atol=1e-6, rtol=0)
    torch.testing.assert_close(trained.noisy[:tokens].float(), sampled.noisy, atol=1e-5, rtol=0)
    clock = draws.global_time.clamp(0, 1)[sampled.layout.frame_clip].float()
    at_the_clock = torch.where(sampled.role > 0, clock, sampled.time)  # the clock of the state is 1 for every clip
    torch.testing.assert_close(trained.time[:frames], at_the_clock, atol=2e-3, rtol=0)


NULL_TEXT = torch.linspace(-1, 1, 2 * 16).view(2, 16).bfloat16()


class Captioned(Latents):
    """The same clips with captions of row % 4 tokens, so some have none."""

    text_width, null_text = 16, NULL_TEXT

    def read_text(self, row):
        return torch.full((row % 4, 16), float(row)) if row % 4 else None


def test_a_clip_with_dropped_condition_equals_an_unprompted_one(make_model):
    """Text length, text rows, class and all positions equal those of sampling without a prompt."""
    model = make_model(text_dim=16)
    config = configs(
        tasks={"t2v": 1.0}, token_budget=600, packs_per_step=1, num_start_frames=2, time_shift=3.0,
        condition_dropout=0.5,
    )  # fmt: skip
    index = ClipIndex.from_arrays(
        frames=6 + np.arange(12) % 4, height=3, width=2, class_label=np.arange(12) % 3, text_tokens=np.arange(12) % 4
    )
    plan = Plan(index, None, *config, model.spec, seed=5, null_text_tokens=len(NULL_TEXT))
    (pack_plan,) = plan.step(Cursor(0, 0)).packs
    trained = build_pack(plan, pack_plan, Captioned())
    assert plan.step(Cursor(0, 0)).tokens == sum(trained.layout.segment_lengths[: len(pack_plan.rows)])
    draws = plan.clip_draws(pack_plan).clips
    kept = plan.clip_draws(pack_plan).keeps_condition.tolist()
    assert len(set(kept)) == 2
    rows = pack_plan.rows.tolist()
    labels = [row % 3 if keep else -1 for row, keep in zip(rows, kept, strict=True)]
    texts = [
        Captioned().read_text(row) if keep and row % 4 else NULL_TEXT for row, keep in zip(rows, kept, strict=True)
    ]
    state = state_of(plan, pack_plan, draws)
    sampled = NetworkPredictor(model, labels, texts=texts, null_text=NULL_TEXT).build_pack(state)
    tokens, text_rows = len(sampled.noisy), len(sampled.text)
    assert trained.layout.segment_lengths[: len(rows)] == sampled.layout.segment_lengths
    assert torch.equal(trained.layout.token_position[:tokens], sampled.layout.token_position)
    assert torch.equal(trained.layout.text_token[:text_rows], sampled.layout.text_token)
    assert torch.equal(trained.text[:text_rows], sampled.text)
    assert torch.equal(trained.class_label[: len(rows)], sampled.class_label)

    guided = NetworkPredictor(model, [0] * len(rows), texts=[torch.ones(3, 16)] * len(rows), null_text=NULL_TEXT,
                              guidance=2.0).build_pack(state)  # fmt: skip
    half = len(guided.noisy) - sum(guided.layout.segment_lengths[len(rows) :])
    unprompted = NetworkPredictor(model, [-1] * len(rows), texts=[NULL_TEXT] * len(rows)).build_pack(state)
    assert torch.equal(guided.text[3 * len(rows) :], unprompted.text)
    assert torch.equal(guided.layout.token_position[half:], unprompted.layout.token_position)
    assert torch.equal(guided.noisy[half:], unprompted.noisy)
