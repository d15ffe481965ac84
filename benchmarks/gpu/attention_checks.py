"""Checks of attention in packs: accuracy against float64, and the cost of the number of segments.

Shape legend: ``T`` tokens of a pack, ``H`` heads, ``d`` width of a head, ``S`` segments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.environment import kernels
from benchmarks.gpu.outcome import MEASURED, PASS, CheckFailed, Outcome
from benchmarks.gpu.scene import Case, Scene, needs_gpu, relative_error
from flowception.nn.attention import attention, choose_backend
from flowception.packing.layout import ClipShape, PackLayout, build_layout

_LARGEST_ERROR = 1e-2
_NAMES = ("output", "d query", "d key", "d value")


def random_heads(scene: Scene, case: Case, count: int, seed: int = 0) -> list[Tensor]:
    """Tensors ``[T, H, d]`` of the network's sizes, bfloat16, on the device."""
    spec = case.config.model.spec()
    shape = (case.config.plan.token_budget, spec.num_heads, spec.hidden_size // spec.num_heads)
    generator = torch.Generator(scene.device).manual_seed(seed)
    return [torch.randn(shape, device=scene.device, generator=generator).bfloat16() for _ in range(count)]


def plain_attention(inputs: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    """Attention by its formula, segment by segment, in the dtype of the inputs ``[T, H, d]``."""
    outputs = []
    for query, key, value in zip(*(part.split(list(lengths)) for part in inputs), strict=True):
        scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), value))
    return torch.cat(outputs)


def _errors(scene: Scene, case: Case, layout: PackLayout) -> dict[str, float]:
    """Relative errors of output and gradients of one pack, padding segments included."""
    *inputs, weight = random_heads(scene, case, 4)
    query, key, value = (part.requires_grad_() for part in inputs)
    output = attention(query, key, value, layout.to(scene.device))
    found = [output, *torch.autograd.grad(output, inputs, weight)]
    exact = [part.detach().double().requires_grad_() for part in inputs]
    reference = plain_attention(exact, layout.segment_lengths)
    expected = [reference, *torch.autograd.grad(reference, exact, weight.double())]
    return {name: relative_error(a, b) for name, a, b in zip(_NAMES, found, expected, strict=True)}


def _layouts(case: Case) -> dict[str, PackLayout]:
    """A planned pack, a pack filled with complete clips, and a pack of padding only."""
    shape, clip = case.plan.pack_shape, case.clip
    whole, left = divmod(shape.token_budget, clip.tokens)
    per_frame = clip.height * clip.width + 1
    frames, text = divmod(left, per_frame)
    rest = [ClipShape(frames, clip.height, clip.width, text)] if frames else []
    full = [clip] * whole + rest
    return {
        "planned": case.batch(0).packs[0].layout,
        "full": build_layout(full, shape),
        "padding": case.padding().layout,
    }


def against_float64(scene: Scene) -> Outcome:
    """Check ``attention`` with its automatic backend, forward and backward, on three packs."""
    case = scene.recipe()
    figures: dict[str, Any] = {"backend": choose_backend(scene.device, torch.bfloat16)}
    for name, layout in _layouts(case).items():
        figures[name] = {"segments": len(layout.segment_lengths), **_errors(scene, case, layout)}
    worst = {name: max(figures[pack][name] for pack in ("planned", "full", "padding")) for name in _NAMES}
    said = f"{figures['backend']}, relative errors of three packs at most " + ", ".join(
        f"{name} {value:.2g}" for name, value in worst.items()
    )
    bad = [
        (pack, name)
        for pack in ("planned", "full", "padding")
        for name in _NAMES
        if not figures[pack][name] < _LARGEST_ERROR
    ]
    if bad:
        raise CheckFailed(f"{said}; errors must be below {_LARGEST_ERROR}, got {bad}", figures)
    return Outcome(PASS, said, figures)


def static_cu_seqlens(case: Case, layout: PackLayout) -> Tensor:
    """Boundaries for the maximum number of segments of the pack shape, int32; the tail repeats T."""
    own = torch.tensor([0, *layout.segment_lengths], dtype=torch.int32).cumsum(0).int()
    shape = case.plan.pack_shape
    most = shape.max_clips + -(-shape.token_budget // shape.max_seqlen)
    return torch.cat([own, own.new_full((most + 1 - len(own),), shape.token_budget)])


@contextmanager
def flash_kernel(name: str) -> Iterator[None]:
    """Use the named FlashAttention in torch inside the block; FA2 is built in."""
    if name == "FA2":
        yield
        return
    from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

    activate_flash_attention_impl(name)
    try:
        yield
    finally:
        restore_flash_attention_impl()


def _measure(
    scene: Scene, inputs: list[Tensor], weight: Tensor, call: Callable[[], Tensor], expected: list[Tensor]
) -> dict[str, float]:
    """Milliseconds forward and backward, peak working memory of both, and the error."""
    output = call()
    gradients = list(torch.autograd.grad(output, inputs, weight, retain_graph=True))
    errors = [relative_error(a, b) for a, b in zip([output, *gradients], expected, strict=True)]
    del gradients
    forward = scene.median_ms(call)
    backward = scene.median_ms(lambda: torch.autograd.grad(output, inputs, weight, retain_graph=True))
    scene.synchronize()
    before = torch.cuda.memory_allocated(scene.device)
    torch.cuda.reset_peak_memory_stats(scene.device)
    torch.autograd.grad(output, inputs, weight, retain_graph=True)
    peak = torch.cuda.max_memory_allocated(scene.device)
    return {
        "forward_ms": forward,
        "backward_ms": backward,
        "backward_mib": (peak - before) / 2**20,
        "error": max(errors),
    }


def segments(scene: Scene) -> Outcome:
    """Time the kernel of ``attention`` with the static boundaries and with the pack's actual boundaries."""
    if not scene.on_gpu:
        return needs_gpu("variable-length kernels run on CUDA only")
    from torch.nn.attention.varlen import varlen_attn

    case = scene.recipe()
    layout = case.batch(0).packs[0].layout
    *inputs, weight = random_heads(scene, case, 4)
    exact = [part.float().requires_grad_() for part in inputs]
    reference = plain_attention(exact, layout.segment_lengths)
    expected = [reference.detach(), *torch.autograd.grad(reference, exact, weight.float())]
    for part in inputs:
        part.requires_grad_()
    static = static_cu_seqlens(case, layout).to(scene.device)
    tight, longest = static[: len(layout.segment_lengths) + 1].contiguous(), max(layout.segment_lengths)
    ways = {"static": (static, case.plan.pack_shape.max_seqlen), "tight": (tight, longest)}
    figures: dict[str, Any] = {"segments": {"static": len(static) - 1, "tight": len(tight) - 1}, "kernels": kernels()}
    ready = ["FA2", *(name for name, state in figures["kernels"].items() if state == "ready")]
    for kernel in ready:
        for way, (cu, most) in ways.items():
            figures[f"{kernel} {way}"] = _one_way(scene, kernel, inputs, weight, expected, cu, most, varlen_attn)
            scene.note(Outcome(MEASURED, _segments_said(figures, ready), figures))
    bad = [name for name, found in figures.items() if "error" in found and not found["error"] < _LARGEST_ERROR]
    if bad:
        raise CheckFailed(
            f"relative errors must be below {_LARGEST_ERROR}, got {bad}; {_segments_said(figures, ready)}", figures
        )
    return Outcome(MEASURED, _segments_said(figures, ready), figures)


def _one_way(
    scene: Scene,
    kernel: str,
    inputs: list[Tensor],
    weight: Tensor,
    expected: list[Tensor],
    cu_seqlens: Tensor,
    longest: int,
    varlen_attn: Callable[..., Any],
) -> dict[str, Any]:
    try:
        with flash_kernel(kernel):
            call = lambda: varlen_attn(*inputs, cu_seqlens, cu_seqlens, longest, longest)  # noqa: E731
            return _measure(scene, inputs, weight, call, expected)
    except (RuntimeError, ImportError, ValueError) as error:
        if kernel == "FA2":
            raise
        return {"refused": " ".join(str(error).split())[:200]}


def _segments_said(figures: dict[str, Any], ready: Sequence[str]) -> str:
    words = []
    for kernel in ready:
        for way in ("static", "tight"):
            found = figures.get(f"{kernel} {way}")
            if found and "refused" not in found:
                words.append(
                    f"{kernel} {figures['segments'][way]} segments {found['forward_ms']:.2f} + "
                    f"{found['backward_ms']:.2f} ms, {found['backward_mib']:.0f} MiB"
                )
            elif found:
                words.append(f"{kernel} {way}: {found['refused'][:80]}")
    words += [f"{name}: {state}" for name, state in figures["kernels"].items() if state != "ready"]
    return ", ".join(words)
