"""Checks of torch.compile on a block: the functions between its matrix products, and the block as one graph.

Shape legend: ``T`` tokens of a pack, ``R`` rows of a modulation table, ``d`` hidden size, ``H`` heads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.gpu.outcome import PASS, CheckFailed, Outcome
from benchmarks.gpu.scene import Case, Scene, open_model, relative_error, training_loss
from flowception.data.pack import Pack
from flowception.data.step_plan import StepPlan
from flowception.nn.fused_ops import EAGER, NORM_EPSILON, FusedOps
from flowception.packing.layout import PackInput, PackLayout, TokenKind

_LARGEST_ERROR = 1e-2
"""Of bfloat16 against float64."""
_CPU_BACKEND = "aot_eager"
"""Traces like Inductor but skips compilation, which would take a minute on a CPU."""


@contextmanager
def compiler(scene: Scene) -> Iterator[None]:
    """Inside the block, ``torch.compile`` is the default on a GPU and only traces on a CPU; counters start at zero."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    real = torch.compile
    if not scene.on_gpu:
        setattr(torch, "compile", partial(real, backend=_CPU_BACKEND))  # noqa: B010
    try:
        yield
    finally:
        setattr(torch, "compile", real)  # noqa: B010


def graphs() -> dict[str, Any]:
    """Number of graphs since the last reset of torch.compile's counters, and graph breaks by reason."""
    counters = torch._dynamo.utils.counters
    return {
        "graphs": int(counters["stats"]["unique_graphs"]),
        "breaks": {" ".join(str(reason).split())[:200]: int(n) for reason, n in counters["graph_break"].items()},
    }


def _norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + NORM_EPSILON).sqrt()


def _rotated(x: Tensor, rotations: Tensor) -> Tensor:
    first, second = x[..., 0::2], x[..., 1::2]
    cosine, sine = rotations.double().unbind(-1)
    turned = [first * cosine - second * sine, first * sine + second * cosine]
    return torch.stack(turned, dim=-1).flatten(-2)


def _sigmoid_product(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, dim=-1)
    return gate / (1 + (-gate).exp()) * value


FORMULAS: dict[str, Callable[..., Tensor]] = {
    "modulate": lambda x, shift, scale, row: _norm(x) * (1 + scale[row]) + shift[row],
    "add_gated": lambda x, update, gate, row: x + gate[row] * update,
    "norm_and_rotate": lambda heads, weight, rotations: _rotated(_norm(heads) * weight, rotations),
    "swiglu": _sigmoid_product,
}
"""Reference implementation of each function in ``nn.fused_ops``, for float64."""


def block_inputs(model: nn.Module, pack: PackInput) -> dict[str, Any]:
    """Inputs of the network's first block for a pack, by argument name."""
    block: Any = cast(Any, model).blocks[0]
    seen: dict[str, Any] = {}

    def keep(module: nn.Module, words: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.update(inspect.signature(type(block).forward).bind(module, *words, **named).arguments)
        raise _SeenError

    handle = block.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad(), suppress(_SeenError):
        model(pack)
    handle.remove()
    seen.pop("self")
    return seen


class _SeenError(Exception):
    """Stops a forward pass after the first block's inputs are captured."""


def leaf_inputs(scene: Scene, case: Case, pack: PackInput, seen: dict[str, Any]) -> dict[str, list[Any]]:
    """Random inputs of every function in the network's sizes; rows and rotations are the pack's.

    Args:
        scene: The device.
        case: The sizes.
        pack: On the device.
        seen: From ``block_inputs``.
    """
    spec, layout = case.config.model.spec(), pack.layout
    tokens, size, count = (
        case.config.plan.token_budget,
        spec.hidden_size,
        len(layout.frame_rank) + len(layout.clip_frames),
    )
    generator = torch.Generator(scene.device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=scene.device, generator=generator).bfloat16().requires_grad_()

    rows = seen["rows"]
    heads = (tokens, spec.num_heads, size // spec.num_heads)
    return {
        "modulate": [draw(tokens, size), draw(count, size), draw(count, size), rows],
        "add_gated": [draw(tokens, size), draw(tokens, size), draw(count, size), rows],
        "norm_and_rotate": [draw(*heads), draw(heads[2]), seen["rotations"]],
        "swiglu": [draw(tokens, 2 * spec.mlp_hidden_size)],
    }


def _token_rows(layout: PackLayout) -> Tensor:
    """The modulation row of each token (frames, then clips for their text), int64 ``[T]``."""
    text_row = len(layout.frame_rank) + layout.token_clip
    return torch.where(layout.token_kind == TokenKind.TEXT, text_row, layout.token_frame)


def _with_gradients(function: Callable[..., Tensor], inputs: Sequence[Any], weight: Tensor) -> list[Tensor]:
    """Output and gradients of a function, for tokens with nonzero weight."""
    output = function(*inputs)
    wanted = [part for part in inputs if isinstance(part, Tensor) and part.requires_grad]
    gradients = torch.autograd.grad(output, wanted, weight.to(output.dtype))
    return [torch.where(weight != 0, output, 0), *gradients]


def leaves(scene: Scene) -> Outcome:
    """Errors of each function, eager and compiled, on a planned pack, then of the compiled ones on two more packs."""
    case = scene.recipe("model.num_layers=1", "model.compile=off")
    model = open_model(case.config).to(scene.device, torch.bfloat16)
    packs = [pack.to(scene.device) for pack in [*case.batch(0).packs[:2], case.padding()]]
    figures: dict[str, Any] = {}
    with compiler(scene):
        compiled = FusedOps(*(torch.compile(function) for function in EAGER))
        for number, pack in enumerate(packs):
            inputs = leaf_inputs(scene, case, pack, block_inputs(model, pack))
            for name, parts in inputs.items():
                if number == 0:
                    figures[name] = _leaf_errors(pack, name, parts, getattr(compiled, name))
                else:
                    getattr(compiled, name)(*parts).float().sum().backward()
        figures |= graphs()
    names = list(FORMULAS)
    worst = {way: max(figures[name][way] for name in names) for way in ("eager", "compiled")}
    said = (
        f"largest relative error eager {worst['eager']:.2g}, compiled {worst['compiled']:.2g}; {figures['graphs']} "
        f"graphs of {len(names)} functions in {len(packs)} packs, {len(figures['breaks'])} breaks"
    )
    if not max(worst.values()) < _LARGEST_ERROR:
        raise CheckFailed(f"{said}; errors must be below {_LARGEST_ERROR}", figures)
    if figures["graphs"] != len(names) or figures["breaks"]:
        raise CheckFailed(f"{said}; there must be one graph each and no break: {figures['breaks']}", figures)
    return Outcome(PASS, said, figures)


def _leaf_errors(pack: PackInput, name: str, parts: Sequence[Any], compiled: Callable[..., Tensor]) -> dict[str, float]:
    """Largest relative error of output and gradients against float64, without padding, whose rows are arbitrary."""
    weight = torch.randn_like(EAGER._asdict()[name](*parts))
    real = (pack.layout.token_kind != TokenKind.PADDING).view(-1, *[1] * (weight.dim() - 1))
    weight = torch.where(real, weight, 0)
    exact = [part.detach().double().requires_grad_() if _is_drawn(part) else part for part in parts]
    if name in ("modulate", "add_gated"):
        exact[-1] = _token_rows(pack.layout)
    expected = _with_gradients(FORMULAS[name], exact, weight)
    errors = {}
    for way, function in (("eager", EAGER._asdict()[name]), ("compiled", compiled)):
        found = _with_gradients(function, parts, weight)
        errors[way] = max(relative_error(a, b) for a, b in zip(found, expected, strict=True))
    return errors


def _is_drawn(part: Any) -> bool:
    return isinstance(part, Tensor) and part.requires_grad


def whole_blocks(scene: Scene) -> Outcome:
    """Compare compiled and eager blocks in bfloat16 with float32 on three packs."""
    words = ["model.num_layers=2", "model.activation_checkpointing=false"]
    case, eager_case = (scene.recipe(*words, f"model.compile={way}") for way in ("blocks", "off"))
    batch = case.batch(0)
    packs = [pack.to(scene.device) for pack in [*batch.packs[:2], case.padding()]]
    figures: dict[str, Any] = {}
    with compiler(scene):
        model = open_model(case.config).to(scene.device, torch.bfloat16)
        ours = [_gradient(model, pack, batch.step_plan) for pack in packs]
        with torch.no_grad():
            model(packs[0])
        figures |= graphs()
        del model
    eager = open_model(eager_case.config).to(scene.device)
    exact = [_gradient(eager, pack, batch.step_plan) for pack in packs[:2]]
    eager = eager.to(torch.bfloat16)
    theirs = [_gradient(eager, pack, batch.step_plan) for pack in packs[:2]]
    figures["compiled_error"] = max(relative_error(a, b) for a, b in zip(ours, exact))
    figures["eager_error"] = max(relative_error(a, b) for a, b in zip(theirs, exact))
    figures["padding_gradient"] = float(ours[2].abs().max())
    said = (
        f"{figures['graphs']} graphs, {len(figures['breaks'])} breaks in {len(packs)} packs; gradient's relative error "
        f"against fp32: compiled {figures['compiled_error']:.2g}, eager {figures['eager_error']:.2g}"
    )
    if figures["graphs"] not in (1, 2) or figures["breaks"]:
        raise CheckFailed(
            f"{said}; there must be one graph for training, at most one more without gradients, and no break: "
            f"{figures['breaks']}",
            figures,
        )
    if not figures["compiled_error"] <= 1.5 * figures["eager_error"] + 1e-3:
        raise CheckFailed(f"{said}; the compiled error must be at most 1.5 times the eager error", figures)
    if figures["padding_gradient"] != 0:
        raise CheckFailed(
            f"{said}; gradients of a padding pack must be 0, got up to {figures['padding_gradient']}", figures
        )
    return Outcome(PASS, said, figures)


def _gradient(model: nn.Module, pack: Pack, step: StepPlan) -> Tensor:
    """The gradient of the training loss, flattened and concatenated over parameters, float32."""
    model.zero_grad(set_to_none=True)
    training_loss(model(pack), pack, step, insertion_loss_weight=1.0).backward()
    return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])
