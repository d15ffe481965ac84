"""Flowception: train and sample video models that insert frames while they denoise.

    run = flowception.load("demo/run")
    clips = run.sample(num=4, seed=0)

The public names (docs/api.md) are imported on first use, so that ``import flowception`` is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flowception.errors import FlowceptionError
    from flowception.generation.clip import Clip
    from flowception.generation.growth import Growth
    from flowception.generation.run import Run, load

__version__ = "0.1.0"
__all__ = ["Clip", "FlowceptionError", "Growth", "Run", "load"]

_HOMES = {
    "Clip": "flowception.generation.clip",
    "FlowceptionError": "flowception.errors",
    "Growth": "flowception.generation.growth",
    "Run": "flowception.generation.run",
    "load": "flowception.generation.run",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'flowception' has no attribute {name!r}; public names are {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
