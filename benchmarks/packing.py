"""Time saved by packing: one model trained on the same clips in three ways, interleaved in one run.

* ``packed``: Flowception with only the visible frames, clips concatenated, attention within each clip (ours).
* ``padded``: Flowception with every clip at full length, deleted frames masked out of attention (the official code).
* ``full``: full-sequence flow matching, every frame visible, packed.

The time is that of forward, loss and backward in seconds per clip: the median over interleaved repeats, averaged over
draws of the visible frames. FLOPs are exact, forward and backward. ``packed`` and ``padded`` are the same computation,
so the run stops if their losses differ. ``compiled_speedup`` is the speedup of ``packed`` with compiled blocks on the
first draw (``benchmarks/compiled_blocks.py``; needs a C++ compiler).

    python benchmarks/packing.py --json packing.json --picture packing.png

Shape legend: ``B`` clips, ``N`` frames, ``P`` latent tokens of a frame, ``C`` channels, ``T`` tokens, ``F`` frames of
a pack.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts import each other as benchmarks.NAME

from benchmarks import compiled_blocks
from flowception import rng
from flowception.flow import (
    ClipDraws,
    Denominators,
    ProcessConfig,
    denominators,
    draw_clips,
    expected_counts,
    insertion_loss_sum,
    velocity_loss_sum,
)
from flowception.nn import (
    ClipShape,
    DiTConfig,
    FlowceptionDiT,
    ModelRole,
    PackInput,
    PackLayout,
    build_layout,
    training_flops,
)

WAYS = ("packed", "padded", "full")
FLOP_RATIO_TOLERANCE = 0.10
"""Maximum relative difference between ``packed_over_full`` and the ratio of FLOPs."""
MAX_PACKED_OVER_PADDED = {"share_0.5": 0.80, "share_1": 0.62}


@dataclass(frozen=True)
class Latents:
    """Clips, noise and the token grid of a frame."""

    data: Tensor
    """[B, N, P, C]: x_1."""
    noise: Tensor
    """[B, N, P, C]: x_0."""
    grid: tuple[int, int]
    """Height and width, P = height * width."""


def grid_of(tokens_per_frame: int) -> tuple[int, int]:
    """The most nearly square grid with this many tokens."""
    height = next(h for h in range(int(tokens_per_frame**0.5), 0, -1) if tokens_per_frame % h == 0)
    return height, tokens_per_frame // height


def make_latents(arguments: argparse.Namespace) -> Latents:
    """Random clips; the time of a step does not depend on their content."""
    generator = torch.Generator().manual_seed(arguments.seed)
    shape = (arguments.clips, arguments.frames, arguments.tokens_per_frame, arguments.channels)
    data, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    return Latents(data, noise, grid_of(arguments.tokens_per_frame))


def make_draws(arguments: argparse.Namespace, process: ProcessConfig, draw: int) -> ClipDraws:
    """Draw the visible frames and noise levels of each clip, with global times stratified over clips as in the plan."""
    clips, frames = arguments.clips, arguments.frames
    jitter = rng.uniforms(arguments.seed, rng.Stream.GLOBAL_TIME, epoch=draw, clip=np.arange(clips))[:, 0]
    u_frame = rng.uniforms(
        arguments.seed, rng.Stream.FRAME, epoch=draw, clip=np.arange(clips)[:, None], frame=np.arange(frames)
    )
    return draw_clips(
        config=process,
        num_frames=np.full(clips, frames),
        u_time=(np.arange(clips) + jitter) / clips,
        u_task=np.zeros(clips),
        u_frame=u_frame,
    )


def make_model(arguments: argparse.Namespace) -> FlowceptionDiT:
    """The network for all three ways, with nonzero gates."""
    config = DiTConfig(
        preset=None,
        in_channels=arguments.channels,
        hidden_size=arguments.width,
        num_layers=arguments.depth,
        num_heads=arguments.heads,
    )
    model = FlowceptionDiT(config).initialize(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return model


def masked_attention(layout: PackLayout, visible: Tensor) -> Callable[..., Tensor]:
    """Attention over clips of equal length with the keys of deleted frames masked.

    Args:
        layout: B segments of the full length.
        visible: bool [F], in the order of the frame slots.

    Returns:
        A replacement for ``nn.attention.attention``.
    """
    clips, length = len(layout.segment_lengths), layout.segment_lengths[0]
    mask = visible[layout.token_frame].view(clips, 1, 1, length)

    def attend(query: Tensor, key: Tensor, value: Tensor, layout: PackLayout) -> Tensor:
        q, k, v = (part.unflatten(0, (clips, length)).transpose(1, 2) for part in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(0, 1)

    return attend


@dataclass
class TrainingStep:
    """One way of training on one draw, ready to run."""

    model: FlowceptionDiT
    attend: Callable[..., Tensor]
    pack: PackInput
    velocity_target: Tensor
    """[T, C]."""
    velocity_mask: Tensor
    """bool [T]."""
    missing: Tensor
    """[F]."""
    insertion_mask: Tensor
    """bool [F]."""
    weight: Tensor
    """[F]: importance weight of the clip."""
    denominators: Denominators
    insertion_loss_weight: float
    flops: float
    """Forward and backward FLOPs of all clips."""

    def run(self, model: FlowceptionDiT | None = None) -> tuple[float, float]:
        """Run forward, loss and backward, optionally of another network; return seconds and loss."""
        model = model or self.model
        model.zero_grad(set_to_none=True)
        model.attend = self.attend
        start = time.perf_counter()
        output = model(self.pack)
        weight_token = self.weight[self.pack.layout.token_frame]
        velocity = velocity_loss_sum(output.velocity, self.velocity_target, self.velocity_mask, weight_token)
        insertion = insertion_loss_sum(output.log_rate, self.missing, self.insertion_mask, self.weight)
        loss = (
            velocity / self.denominators.velocity + self.insertion_loss_weight * insertion / self.denominators.insertion
        )
        loss.backward()
        return time.perf_counter() - start, float(loss.detach())


def make_step(
    model: FlowceptionDiT, latents: Latents, process: ProcessConfig, draws: ClipDraws, *, padded: bool
) -> TrainingStep:
    """Lay out a draw: only visible frames or, if ``padded``, followed by the deleted ones.

    Args:
        model: The network.
        latents: The clips.
        process: Process of the draws.
        draws: The draws.
        padded: Whether to include deleted frames, masked.

    Returns:
        A step that can be run repeatedly.
    """
    clips, frames, _, channels = latents.data.shape
    visible = draws.visible
    order = torch.argsort(~visible, dim=1, stable=True)
    shown = torch.ones_like(visible) if padded else visible.gather(1, order)
    clip = torch.arange(clips)[:, None].expand(-1, frames)[shown]
    frame = order[shown]
    kept = visible[clip, frame]
    counts = shown.sum(dim=1).tolist()
    layout = build_layout([ClipShape(count, *latents.grid) for count in counts])
    layout = replace(layout, clip_frames=draws.visible_frames)

    def on_tokens(per_frame: Tensor) -> Tensor:
        tokens = torch.zeros(layout.shape.token_budget, channels)
        tokens[layout.latent_mask] = per_frame.flatten(0, 1)
        return tokens

    shown_time = draws.shown_time[clip, frame].float()
    data, noise = latents.data[clip, frame], latents.noise[clip, frame]
    noisy = torch.lerp(noise, data, shown_time[:, None, None])
    pack = PackInput(
        layout=layout,
        noisy=on_tokens(noisy),
        condition=torch.zeros(layout.shape.token_budget, channels),
        time=shown_time,
        role=torch.full_like(frame, int(ModelRole.GENERATED)),
        class_label=torch.full((clips,), -1),
        text=None,
    )
    in_flow = draws.flow_mask[clip, frame] & kept
    schedule = process.schedule()
    elements = torch.full((clips,), latents.data[0, 0].numel())
    counts_expected = expected_counts(draws.roles, elements, schedule, process.delay_law)
    return TrainingStep(
        model=model,
        attend=masked_attention(layout, kept) if padded else FlowceptionDiT(model.config).attend,
        pack=pack,
        velocity_target=on_tokens(data - noise),
        velocity_mask=layout.latent_mask & in_flow[layout.token_frame],
        missing=draws.missing[clip, frame],
        insertion_mask=draws.insertion_mask[clip, frame] & kept,
        weight=draws.weight[clip].float(),
        denominators=denominators(*counts_expected),
        insertion_loss_weight=process.insertion_loss_weight,
        flops=float(training_flops(model.spec, np.array(counts), *latents.grid).sum()),
    )


def make_steps(
    arguments: argparse.Namespace, model: FlowceptionDiT, latents: Latents, share: float, draw: int
) -> dict[str, TrainingStep]:
    """Steps of one draw in all three ways."""
    flowception = ProcessConfig(num_start_frames=arguments.num_start_frames, insertion_share=share)
    full_sequence = replace(flowception, delay_law="full_sequence")
    draws = make_draws(arguments, flowception, draw)
    return {
        "packed": make_step(model, latents, flowception, draws, padded=False),
        "padded": make_step(model, latents, flowception, draws, padded=True),
        "full": make_step(model, latents, full_sequence, make_draws(arguments, full_sequence, draw), padded=False),
    }


def check_same_loss(steps: dict[str, TrainingStep]) -> None:
    """Check that packed and padded compute the same loss; also serves as warm-up.

    Raises:
        SystemExit: If the losses differ.
    """
    losses = {name: step.run()[1] for name, step in steps.items()}
    if abs(losses["packed"] - losses["padded"]) > 1e-5 * abs(losses["padded"]):
        raise SystemExit(f"packed and padded must have the same loss, got {losses}")


def measure(arguments: argparse.Namespace, share: float) -> dict[str, float]:
    """Measure one prior."""
    model, latents = make_model(arguments), make_latents(arguments)
    seconds = dict.fromkeys(WAYS, 0.0)
    flops, compiled = dict.fromkeys(WAYS, 0.0), {}
    for draw in range(arguments.draws):
        steps = make_steps(arguments, model, latents, share, draw)
        check_same_loss(steps)
        if draw == 0 and compiled_blocks.why_not() is None:
            compiled["compiled_speedup"] = compiled_blocks.speedup(model, steps["packed"].run, arguments.repeats)
        times: dict[str, list[float]] = {name: [] for name in WAYS}
        for _ in range(arguments.repeats):
            for name in WAYS:
                times[name].append(steps[name].run()[0])
        for name in WAYS:
            seconds[name] += statistics.median(times[name]) / arguments.clips / arguments.draws
            flops[name] += steps[name].flops / arguments.clips / arguments.draws
    return {
        **{f"{name}_s": seconds[name] for name in WAYS},
        "packed_over_padded": seconds["packed"] / seconds["padded"],
        "packed_over_full": seconds["packed"] / seconds["full"],
        "flops_packed_over_full": flops["packed"] / flops["full"],
        **{f"{name}_flops": flops[name] for name in WAYS},
        **compiled,
    }


def missed_bounds(results: dict[str, dict[str, float]]) -> list[str]:
    """List missed speed targets, one line each; meant for the default sizes on an idle machine."""
    missed = []
    for key, result in results.items():
        measured, flops = result["packed_over_full"], result["flops_packed_over_full"]
        if abs(measured / flops - 1) > FLOP_RATIO_TOLERANCE:
            missed.append(
                f"{key}: packed_over_full is {measured:.3f}, not within {FLOP_RATIO_TOLERANCE:.0%} of the FLOP ratio "
                f"{flops:.3f}"
            )
        bound = MAX_PACKED_OVER_PADDED.get(key)
        if bound is not None and result["packed_over_padded"] > bound:
            missed.append(f"{key}: packed_over_padded is {result['packed_over_padded']:.3f}, above {bound}")
        faster = result.get("compiled_speedup", compiled_blocks.MIN_SPEEDUP)
        if faster < compiled_blocks.MIN_SPEEDUP:
            missed.append(f"{key}: compiled_speedup is {faster:.3f}, below {compiled_blocks.MIN_SPEEDUP}")
    return missed


def draw_picture(results: dict[str, dict[str, float]], path: Path) -> None:
    """Plot seconds per clip as bars, with the FLOP ratio as a reference line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 3.5), layout="constrained")
    colors = {"packed": "#0b6e4f", "padded": "#a0a0a0", "full": "#5c6a79"}
    labels = {"packed": "Flowception, packed", "padded": "Flowception, padded", "full": "full sequence, packed"}
    for place, result in enumerate(results.values()):
        for column, name in enumerate(WAYS):
            x = place + 0.27 * (column - 1)
            seconds = result[f"{name}_s"]
            axes.bar(x, seconds, width=0.25, color=colors[name], label=labels[name] if place == 0 else None)
            axes.text(x, seconds / 2, f"{seconds * 1e3:.0f} ms", ha="center", color="white", fontsize=9)
        expected = result["full_s"] * result["flops_packed_over_full"]
        label = "full sequence x FLOP ratio" if place == 0 else None
        axes.plot([place - 0.4, place - 0.14], [expected] * 2, color="black", linestyle="--", linewidth=1, label=label)
    axes.set_xticks(range(len(results)), ["insertion_" + key.replace("_", " ") for key in results])
    axes.set_ylabel("seconds per clip (forward + loss + backward)")
    axes.margins(y=0.3)
    axes.legend(fontsize=8, ncols=2, loc="upper center")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="file for the results")
    parser.add_argument("--picture", type=Path, help="file for the plot")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a speed target is missed")
    parser.add_argument("--frames", type=int, default=16, help="latent frames per clip")
    parser.add_argument("--tokens-per-frame", type=int, default=36, help="latent tokens per frame")
    parser.add_argument("--width", type=int, default=192, help="hidden size")
    parser.add_argument("--depth", type=int, default=4, help="layers")
    parser.add_argument("--heads", type=int, default=4, help="attention heads")
    parser.add_argument("--channels", type=int, default=16, help="latent channels")
    parser.add_argument("--clips", type=int, default=8, help="clips per pack")
    parser.add_argument("--num-start-frames", type=int, default=3, help="frames present from the start")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 1.0], help="insertion_share of each prior")
    parser.add_argument("--draws", type=int, default=3, help="draws of the visible frames")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats per draw")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, clips and draws")
    return parser.parse_args()


def main() -> int:
    """Measure, print and write the results; with ``--check``, compare them with the speed targets."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    results = {}
    for share in arguments.shares:
        results[f"share_{share:g}"] = result = measure(arguments, share)
        if (reason := compiled_blocks.why_not()) is not None:
            print(f"compiled blocks are not timed: {reason}", flush=True)
        print(f"share {share:g}: " + ", ".join(f"{name} {value:.4g}" for name, value in result.items()), flush=True)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    if arguments.picture is not None:
        arguments.picture.parent.mkdir(parents=True, exist_ok=True)
        draw_picture(results, arguments.picture)
    missed = missed_bounds(results) if arguments.check else []
    for line in missed:
        print(f"MISSED {line}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
