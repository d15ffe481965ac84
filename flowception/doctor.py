"""The checks of ``flowception doctor``: whether this machine can train and generate."""

from __future__ import annotations

import importlib
import importlib.metadata
import io
import os
import platform
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from flowception import __version__

PACKAGES = ("torch", "numpy", "deepspeed", "safetensors", "omegaconf", "webdataset", "av")
OPTIONAL_PACKAGES = ("flash-attn", "diffusers", "transformers", "wandb")
_ATTENTION_TOLERANCE = (1e-4, 0.05)
"""Maximum error relative to the largest value, in float32 and in bfloat16 (relative spacing 2^-8)."""


def report(gpu_problem: str = "") -> list[tuple[str, str]]:
    """Run every check. A failed check is reported in its result; none raises.

    Args:
        gpu_problem: Why training would reject this machine's GPUs; empty if it would accept them.

    Returns:
        Name and result of each check, in order. The result starts with MISSING or FAILED if the check did not pass.
    """
    checks: list[tuple[str, Callable[[], str]]] = [
        ("flowception", lambda: __version__),
        ("python", lambda: f"{platform.python_version()} ({sys.executable})"),
        *((name, partial(_version, name)) for name in PACKAGES),
        *((name, partial(_version, name, optional=True)) for name in OPTIONAL_PACKAGES),
        ("torch build", _torch_build),
        ("gpus", partial(_gpus, gpu_problem)),
        ("attention", _attention),
        ("deepspeed import", lambda: f"ok, {importlib.import_module('deepspeed').__version__}"),
        ("h264", _h264),
        ("cpu cores", lambda: f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}"),
        ("free disk here", lambda: f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB in {Path.cwd()}"),
        ("free disk for tmp", _free_tmp),
    ]
    return [(name, _finding(check)) for name, check in checks]


def _finding(check: Callable[[], str]) -> str:
    try:
        return check()
    except Exception as error:  # report any failure
        return f"FAILED: {type(error).__name__}: {' '.join(str(error).split())}"


def _version(package: str, *, optional: bool = False) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed (optional)" if optional else "MISSING: run make setup"


def _torch_build() -> str:
    import torch

    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    backends = [name for name in ("nccl", "gloo") if getattr(torch.distributed, f"is_{name}_available")()]
    return f"{torch.__version__}, {cuda}, {torch.get_num_threads()} threads, process groups: {', '.join(backends)}"


def _gpus(problem: str) -> str:
    """The GPUs that torch sees; raises if training would reject them."""
    import torch

    if problem:
        raise RuntimeError(problem)
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda} but SEES NO GPU" if torch.version.cuda else "none"
        return f"{built} (training and generation run on the CPU)"
    names = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        names.append(f"{properties.name} {properties.total_memory / 2**30:.0f} GiB")
    return "; ".join(names)


def _attention() -> str:
    """Run training's attention backend, forward and backward, and compare it with plain float64."""
    import torch

    from flowception.nn.attention import attention, choose_backend
    from flowception.packing.layout import ClipShape, build_layout

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layout = build_layout([ClipShape(2, 4, 4, 3), ClipShape(3, 4, 4, 0)])
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(layout.shape.token_budget, 2, 64, generator=generator) for _ in range(3)]

    def run(device: torch.device, dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
        query, key, value = (tensor.to(device, dtype, copy=True).requires_grad_() for tensor in given)
        output = attention(query, key, value, layout.to(device), backend=backend)
        gradients = torch.autograd.grad(output.square().sum(), (query, key, value))
        return [tensor.detach().cpu().double() for tensor in (output, *gradients)]

    found, expected = run(device, dtype, "auto"), run(torch.device("cpu"), torch.float64, "sdpa")
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))
    where = f"{choose_backend(device, dtype, 'auto')} for {device.type} in {str(dtype).removeprefix('torch.')}"
    if not error < _ATTENTION_TOLERANCE[dtype == torch.bfloat16]:
        raise ValueError(f"{where} has a relative error of {error:.2g}, forward or backward")
    return f"{where}, forward and backward within {error:.1g} (relative)"


def _h264() -> str:
    """Encode two frames in memory and read them back."""
    import av

    memory = io.BytesIO()
    with av.open(memory, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        for value in (0, 255):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), value, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    memory.seek(0)
    with av.open(memory) as container:
        means = [frame.to_ndarray(format="rgb24").mean() for frame in container.decode(video=0)]
    if len(means) != 2 or abs(means[0]) > 8 or abs(means[1] - 255) > 8:
        raise ValueError(f"frames of 0 and 255 were read back with means {means}")
    return "ok, two frames written and read back"


def _free_tmp() -> str:
    import tempfile

    folder = tempfile.gettempdir()
    return f"{shutil.disk_usage(folder).free / 2**30:.1f} GiB in {folder}"
