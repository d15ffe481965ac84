"""Times each operator of a block and compares it with the card's memory bandwidth and matrix throughput.

Bytes are the minimum: every input read once, every output written once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.attention_checks import random_heads
from benchmarks.gpu.block_checks import block_inputs, compiler, leaf_inputs
from benchmarks.gpu.outcome import MEASURED, Outcome
from benchmarks.gpu.scene import Case, Scene, open_model, relative_error
from flowception.nn.attention import attention
from flowception.nn.fused_ops import EAGER, FusedOps
from flowception.nn.presets import COMPILE
from flowception.nn.rows import Rows, sum_runs
from flowception.packing.layout import PackInput, PackLayout, TokenKind

_COPY_MIB = {"cuda": 1024, "cpu": 8}
_PRODUCT_SIZE = {"cuda": 8192, "cpu": 128}
_IN_A_ROW = 10
"""Calls timed together for operators that run no longer than their launch."""


def ceilings(scene: Scene) -> dict[str, float]:
    """Measured peaks of the card: a large copy in TB/s (read plus write), a large bfloat16 product in TFLOP/s."""
    source = torch.randn(_COPY_MIB[scene.device.type] * 2**18, device=scene.device)
    target = torch.empty_like(source)
    copy_ms = scene.median_ms(lambda: target.copy_(source))
    size = _PRODUCT_SIZE[scene.device.type]
    a, b = (torch.randn(size, size, device=scene.device).bfloat16() for _ in range(2))
    product_ms = scene.median_ms(lambda: a @ b)
    return {
        "copy_tb_per_s": 2 * source.numel() * 4 / copy_ms / 1e9,
        "product_tflops": 2.0 * size**3 / product_ms / 1e9,
    }


def both_ways(scene: Scene, function: Callable[..., Tensor], parts: Sequence[Any]) -> dict[str, float]:
    """Milliseconds of a function forward and backward."""
    output = function(*parts)
    wanted = [part for part in parts if isinstance(part, Tensor) and part.requires_grad]
    weight = torch.randn_like(output)
    return {
        "forward_ms": scene.median_ms(lambda: function(*parts)),
        "backward_ms": scene.median_ms(lambda: torch.autograd.grad(output, wanted, weight, retain_graph=True)),
    }


def _bytes(parts: Sequence[Any]) -> int:
    return sum(part.numel() * part.element_size() for part in parts if isinstance(part, Tensor))


def products(scene: Scene, case: Case) -> dict[str, dict[str, float]]:
    """The matrix products of a block, each with TFLOP/s."""
    spec, tokens = case.config.model.spec(), case.config.plan.token_budget
    size, hidden = spec.hidden_size, spec.mlp_hidden_size
    shapes = {
        "query_key_value": (size, 3 * size),
        "attention_output": (size, size),
        "mlp_in": (size, 2 * hidden),
        "mlp_out": (hidden, size),
    }
    found = {}
    for name, (inner, outer) in shapes.items():
        x = torch.randn(tokens, inner, device=scene.device).bfloat16().requires_grad_()
        weight = torch.randn(outer, inner, device=scene.device).bfloat16().requires_grad_()
        times, flops = both_ways(scene, F.linear, [x, weight]), 2.0 * tokens * inner * outer
        found[name] = times | {
            "forward_tflops": flops / times["forward_ms"] / 1e9,
            "backward_tflops": 2 * flops / times["backward_ms"] / 1e9,
        }
    return found


def attention_times(scene: Scene, case: Case, layout: PackLayout) -> dict[str, float]:
    """Attention on a planned pack, with FlashAttention's count of ``4 d`` FLOPs per pair forward, ``10 d`` backward."""
    inputs = [part.requires_grad_() for part in random_heads(scene, case, 3)]
    times = both_ways(scene, lambda query, key, value: attention(query, key, value, layout), inputs)
    pairs = float(sum(length**2 for length in layout.segment_lengths)) * case.config.model.spec().hidden_size
    return times | {
        "forward_tflops": 4 * pairs / times["forward_ms"] / 1e9,
        "backward_tflops": 10 * pairs / times["backward_ms"] / 1e9,
    }


def leaf_times(scene: Scene, inputs: dict[str, list[Any]]) -> dict[str, dict[str, float]]:
    """The functions between the products, eager and compiled, each with TB/s."""
    found = {}
    compiled = FusedOps(*(torch.compile(function) for function in EAGER))
    for name, parts in inputs.items():
        drawn = _bytes([part for part in parts if isinstance(part, Tensor) and part.requires_grad])
        output = _bytes([EAGER._asdict()[name](*parts)])
        for way, functions in (("eager", EAGER), ("compiled", compiled)):
            times = both_ways(scene, functions._asdict()[name], parts)
            found[f"{name} {way}"] = times | {
                "forward_tb_per_s": (_bytes(parts) + output) / times["forward_ms"] / 1e9,
                "backward_tb_per_s": (_bytes(parts) + output + drawn) / times["backward_ms"] / 1e9,
            }
    return found


def _repeat(function: Callable[[], object]) -> None:
    for _ in range(_IN_A_ROW):
        function()


def run_sum_times(scene: Scene, case: Case, pack: PackInput, rows: Rows) -> dict[str, dict[str, float]]:
    """Modulation gradients summed by runs of tokens, and by ``index_add_``, each with TB/s.

    Args:
        scene: The device.
        case: The sizes.
        pack: On the device.
        rows: The row of each of its tokens.
    """
    shape = (case.config.plan.token_budget, case.config.model.spec().hidden_size)
    real = (pack.layout.token_kind != TokenKind.PADDING).unsqueeze(1)
    values = torch.where(real, torch.randn(shape, device=scene.device), 0.0)

    def by_runs() -> Tensor:
        return sum_runs(values, rows.offsets)

    def by_index() -> Tensor:
        total = torch.zeros(len(rows.run_of_row), shape[1], device=scene.device)
        return total.index_add_(0, rows.row, values)

    found, error = {}, relative_error(by_runs()[rows.run_of_row], by_index())
    for name, function in (("sum_runs", by_runs), ("index_add", by_index)):
        ms = scene.median_ms(partial(_repeat, function)) / _IN_A_ROW
        found[name] = {"ms": ms, "tb_per_s": _bytes([values, function()]) / ms / 1e9, "difference": error}
    return found


def block_times(scene: Scene, pack: PackInput, way: str) -> dict[str, float]:
    """A complete block, for each value of ``model.compile``."""
    case = scene.recipe("model.num_layers=1", f"model.compile={way}", "model.activation_checkpointing=false")
    model = open_model(case.config).to(scene.device, torch.bfloat16)
    seen = block_inputs(model, pack)
    seen["tokens"] = seen["tokens"].detach().requires_grad_()
    block: Any = cast(Any, model).blocks[0]
    wanted = [seen["tokens"], *block.parameters()]
    output = block(**seen)
    weight = torch.randn_like(output)
    backward: Callable[[], Any] = lambda: torch.autograd.grad(  # noqa: E731
        output, wanted, weight, retain_graph=True, allow_unused=True
    )
    return {
        "forward_ms": scene.median_ms(lambda: block(**seen)),
        "backward_ms": scene.median_ms(backward),
    }


def operators(scene: Scene) -> Outcome:
    """All timings of one block."""
    figures: dict[str, Any] = {"ceilings": ceilings(scene)}
    case = scene.recipe("model.num_layers=1", "model.compile=off")
    pack = case.batch(0).packs[0].to(scene.device)
    figures["products"] = products(scene, case)
    figures["attention"] = attention_times(scene, case, pack.layout)
    scene.note(Outcome(MEASURED, said(figures), figures))
    with compiler(scene), functorch_config.patch(donated_buffer=False):  # a backward pass is timed many times
        model = open_model(case.config).to(scene.device, torch.bfloat16)
        seen = block_inputs(model, pack)
        figures["run_sums"] = run_sum_times(scene, case, pack, seen["rows"])
        figures["leaves"] = leaf_times(scene, leaf_inputs(scene, case, pack, seen))
        del model
        scene.note(Outcome(MEASURED, said(figures), figures))
        for way in reversed(COMPILE):
            figures[f"block {way}"] = block_times(scene, pack, way)
            scene.note(Outcome(MEASURED, said(figures), figures))
    return Outcome(MEASURED, said(figures), figures)


def said(figures: dict[str, Any]) -> str:
    """The key figures."""

    def ms(found: dict[str, float]) -> str:
        return f"{found['forward_ms']:.2f} + {found['backward_ms']:.2f} ms"

    def total(parts: Sequence[dict[str, float]]) -> dict[str, float]:
        return {name: sum(part[name] for part in parts) for name in ("forward_ms", "backward_ms")}

    best = figures["ceilings"]
    words = [f"copy {best['copy_tb_per_s']:.2g} TB/s, product {best['product_tflops']:.3g} TFLOP/s at best"]
    words.append(f"forward + backward: products {ms(total(list(figures['products'].values())))}")
    words.append(f"attention {ms(figures['attention'])}")
    for name, found in figures.get("run_sums", {}).items():
        words.append(f"{name} {found['ms']:.3f} ms ({found['tb_per_s']:.2g} TB/s)")
    words += [f"block {way} {ms(figures[f'block {way}'])}" for way in reversed(COMPILE) if f"block {way}" in figures]
    return ", ".join(words)
