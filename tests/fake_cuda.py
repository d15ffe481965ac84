"""CUDA on a CPU: tensors that say they are on ``cuda``, so that placement and waiting can be tested anywhere.

Inside ``FakeCuda`` a tensor that goes to ``cuda`` becomes a ``FakeTensor`` of torch, whose own rules then say which
operations may meet which devices: one that mixes them raises. Beside each lies its content as an ordinary CPU tensor,
on which the same operation is carried out, so that code runs to its end with true numbers, and ``content`` compares
them. Tensors on the CPU stay ordinary. No GPU is asked, also where there is one.

Streams are stand-ins too (``fake_streams``): what one makes and another uses before its time raises.

What crosses between host and device is written down with the function of the package that asked for it:

* ``wait``: the host waits for the device, because it is told a value (``item``) or a size that depends on values (a
  boolean index, ``nonzero``).
* ``to host``: a copy to the host, which waits too.
* ``to device``: a copy from the host's ordinary memory, during which the host waits.
* ``to device, non_blocking``: one that it does not wait for, if the memory is pinned.

Autograd records on these tensors, but its engine asks for CUDA; ``gradients`` walks the record in its place. The mode
turns recording off until it is asked for, and ``to_cuda`` makes a model's weights need no gradient. Kernels that exist
on CUDA alone have stand-ins on the CPU which refuse what the kernels refuse.
"""

from __future__ import annotations

import ctypes
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import flowception
from tests.fake_streams import Streams
from tests.nn import varlen_on_cpu

PACKAGE = Path(flowception.__file__).parent
DEVICE = torch.device("cuda", 0)
"""With its number: without one a CPU build would ask CUDA for it."""
CUDA, META = 1, 14
"""Numbers of the device types, ``c10::DeviceType``."""
aten = torch.ops.aten

WAITS = {
    aten._local_scalar_dense,
    aten.allclose,
    aten.bincount,
    aten.equal,
    aten.histc,
    aten.is_nonzero,
    aten.masked_select,
    aten.nonzero,
    aten.unique_consecutive,
    aten.unique_dim,
    aten._unique,
    aten._unique2,
}
"""Operations whose result, or its size, the host must wait for on CUDA, whatever their arguments."""
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}


@contextmanager
def _device_guard() -> Iterator[None]:
    """A guard for ``cuda`` that does nothing, in a build of torch without CUDA.

    Indexing, among others, asks for the guard of a tensor's device. ``torch._C._ensureCUDADeviceGuardSet``, which
    ``FakeTensorMode`` calls, sets one only in a build with CUDA on a machine without; so ``meta``'s is lent here.
    """
    if torch.backends.cuda.is_built():
        yield
        return
    libc10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (META + 1)).in_dll(libc10, "_ZN3c104impl26device_guard_impl_registryE")
    guards[CUDA] = guards[META]
    try:
        yield
    finally:
        guards[CUDA] = None


def _varlen(query: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    assert query.dtype in (torch.bfloat16, torch.float16)
    return varlen_on_cpu.forward(query, *others)


def _rms_norm_backward(
    gradient: Tensor, x: Tensor, shape: list[int], rstd: Tensor, weight: Tensor | None, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Which torch 2.11 has on CUDA alone."""
    normed, g = x.float() * rstd, gradient.float()
    scaled = g if weight is None else g * weight.float()
    of_x = rstd * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    of_weight = None if weight is None else (g * normed).flatten(0, -2).sum(0).to(weight.dtype)
    return of_x.to(x.dtype) if wanted[0] else None, of_weight if wanted[1] else None


STAND_INS: dict[Any, Callable[..., Any]] = {
    aten._fused_rms_norm_backward.default: _rms_norm_backward,
    torch.ops.torch_attn._varlen_attn.default: _varlen,
    torch.ops.torch_attn._varlen_attn_backward.default: varlen_on_cpu.backward,
}


def _caller() -> str:
    """Innermost function of the package on the stack, ``nn/dit.py:forward``; ``test`` for the test itself."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            return f"{path.relative_to(PACKAGE)}:{frame.f_code.co_qualname.replace('.<locals>', '')}"
        frame = frame.f_back  # type: ignore[assignment]
    return "test"


def _is_cuda(item: Any) -> bool:
    return isinstance(item, FakeTensor) or (isinstance(item, torch.device) and item.type == "cuda")


def _index_waits(args: tuple[Any, ...]) -> str | None:
    """How indexing crosses: a boolean index is turned into places, whose number the host must know.

    One number that is put where a mask is set is not: torch makes a ``masked_fill`` of it.
    """
    indices = [index for index in args[1] if index is not None]
    if not isinstance(args[0], FakeTensor):
        raise RuntimeError("indices on cuda of a tensor on the CPU; CUDA refuses them, torch's fakes do not")
    one_number = len(args) > 2 and not isinstance(args[2], FakeTensor) and args[2].numel() == 1
    if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
        return None if one_number else "wait"
    return None if all(isinstance(part, FakeTensor) for part in (*indices, *args[2:3])) else "to device"


def _crossing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> str | None:
    """What an operation makes host and device do, of those that the module describes; None for nothing."""
    packet = func.overloadpacket
    if packet in WAITS:
        return "wait"
    if packet in INDEXING:
        return _index_waits(args)
    if packet is aten.segment_reduce and not kwargs.get("unsafe", False):
        return "wait"
    if packet is aten.repeat_interleave and kwargs.get("output_size") is None:
        return "wait"
    if packet in (aten._to_copy, aten.copy_):
        source, non_blocking = args[packet is aten.copy_], bool(kwargs.get("non_blocking") or args[2:3] == (True,))
        from_device, to_device = isinstance(source, FakeTensor), result.device.type == "cuda"
        if from_device and not to_device:
            return "to host"
        if to_device and not from_device:
            return "to device, non_blocking" if non_blocking else "to device"
    return None


class FakeCuda(TorchDispatchMode):
    """Makes ``cuda`` exist; what it saw is in ``crossings``."""

    def __init__(self) -> None:
        super().__init__()
        self.crossings: list[str] = []
        """``KIND: FILE:FUNCTION (OPERATION)`` of each crossing, in their order."""
        self._fakes = FakeTensorMode(allow_fallback_kernels=False, allow_non_fake_inputs=True)
        self._streams = Streams()
        self._stack = ExitStack()

    def __enter__(self) -> FakeCuda:
        # Below this mode, so that nothing starts CUDA; what happens on the CPU does not reach it.
        self._stack.enter_context(self._fakes)
        self._stack.enter_context(_device_guard())
        # torch.tensor(..., device="cuda") is made on the host and then copied, as without this mode.
        self._stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        self._stack.enter_context(patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False))
        self._stack.enter_context(patch("torch.cuda.is_bf16_supported", return_value=True))
        self._stack.enter_context(self._streams.patched())
        self._stack.enter_context(torch.no_grad())
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_flatten((args, kwargs))[0]
        if func is torch.ops.prim.device.default or not any(map(_is_cuda, leaves)):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        self._streams.use([leaf for leaf in leaves if isinstance(leaf, FakeTensor)])
        try:
            fake = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            fake = None
        on_host = tree_map(lambda x: content(x) if isinstance(x, Tensor) else x, (args, kwargs))
        on_host = tree_map(lambda x: torch.device("cpu") if _is_cuda(x) else x, on_host)
        crossing = _crossing(func, args, kwargs, fake)
        with unset_fake_temporarily():
            true = STAND_INS.get(func, func)(*on_host[0], **on_host[1])
        if crossing is not None:
            self.crossings.append(f"{crossing}: {_caller()} ({func.overloadpacket.__name__})")
        return self._dressed(fake, true)

    def _dressed(self, fake: Any, true: Any) -> Any:
        """The true result, with every tensor that is on ``cuda`` behind its fake one."""
        trues, spec = tree_flatten(true)
        fakes = [None] * len(trues) if fake is None else tree_flatten(fake)[0]
        return tree_unflatten([self._dress(f, t) for f, t in zip(fakes, trues, strict=True)], spec)

    def _dress(self, fake: Any, true: Any) -> Any:
        if not isinstance(true, Tensor):
            return true
        if fake is None:
            fake = torch.empty_strided(true.shape, true.stride(), dtype=true.dtype, device=DEVICE)
        if fake.device.type == "cpu":
            return true
        assert (fake.shape, fake.dtype) == (true.shape, true.dtype), f"torch's fake is {fake}, the result {true}"
        fake.content = true
        self._streams.make(fake)
        return fake

    def to_cuda(self, model: nn.Module) -> nn.Module:
        """The same model on ``cuda``, its weights without gradients; what it crossed is forgotten."""
        model.requires_grad_(False).to(DEVICE)
        self.crossings.clear()
        return model


def content(tensor: Tensor) -> Tensor:
    """What a tensor holds, as an ordinary one on the CPU."""
    return tensor.content if isinstance(tensor, FakeTensor) else tensor


@torch.no_grad()
def gradients(loss: Tensor, parameters: Iterable[Tensor]) -> list[Tensor | None]:
    """What ``torch.autograd.grad`` gives, by the recorded operations but without autograd's engine.

    Args:
        loss: A scalar, recorded under ``torch.enable_grad()``.
        parameters: FusedOps.

    Returns:
        The gradient of each, None where the loss does not depend on it.
    """
    waiting: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    waiting[loss.grad_fn][0] = torch.ones_like(loss)
    of_leaf: dict[int, Tensor] = {}
    for node in reversed(_inputs_first(loss.grad_fn)):
        known = waiting.pop(node)
        if hasattr(node, "variable"):
            of_leaf[id(node.variable)] = known[0]
            continue
        arriving = [known.get(number) for number in range(len(node._input_metadata))]
        if callable(node):
            leaving = node(*arriving)
        else:  # an autograd.Function, which is given zeros where nothing arrives
            zeros = (torch.zeros(m.shape, dtype=m.dtype, device=m.device) for m in node._input_metadata)
            leaving = node.apply(*(zero if given is None else given for given, zero in zip(arriving, zeros)))
        leaving = leaving if isinstance(leaving, tuple) else (leaving,)
        for (following, number), part in zip(node.next_functions, leaving):
            if following is not None and part is not None:
                wanted = following._input_metadata[number]
                part = part.sum_to_size(wanted.shape).to(wanted.dtype)  # what was broadcast, as the engine does
                sum_so_far = waiting[following].get(number)
                waiting[following][number] = part if sum_so_far is None else sum_so_far + part
    return [of_leaf.get(id(parameter)) for parameter in parameters]


def _inputs_first(last: Any) -> list[Any]:
    """Every node of a record, each behind those that it hands gradients to."""
    order: list[Any] = []
    seen: set[Any] = set()
    stack = [(last, False)]
    while stack:
        node, is_done = stack.pop()
        if is_done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(following, False) for following, _ in node.next_functions if following is not None]
    return order
