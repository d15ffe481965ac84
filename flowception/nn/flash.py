"""Detects the installed FlashAttention packages, which share a name but have different modules.

* Version 2 is built into torch. The package ``flash-attn`` also provides it (``flash_attn_varlen_func``).
* Version 3, for Hopper GPUs, is a separate package (module ``flash_attn_interface``). torch uses it instead of the
  built-in version 2 once it is activated (``torch.nn.attention.activate_flash_attention_impl``).
* Version 4 (``flash-attn-4``) installs only ``flash_attn.cute``, under the same top-level name as version 2.

Shape legend: ``T`` tokens, ``H`` heads, ``d`` width of a head, ``S`` segments.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from flowception.errors import ConfigError, require

_FA3_MODULE = "flash_attn_interface"
_HOPPER = (9, 0)
logger = logging.getLogger(__name__)


class VarlenKernel(Protocol):
    """A variable-length attention kernel."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, /
    ) -> Tensor:
        """Three tensors ``[T, H, d]``, boundaries int32 ``[S + 1]`` and longest segments to ``[T, H, d]``."""


@lru_cache(maxsize=1)
def activate_fa3() -> bool:
    """Switch torch to FlashAttention-3 if its package is installed and the GPU is a Hopper.

    Returns:
        Whether torch uses it.
    """
    if find_spec(_FA3_MODULE) is None or not torch.cuda.is_available():
        return False
    if torch.cuda.get_device_capability() != _HOPPER:
        return False
    from torch.nn.attention import activate_flash_attention_impl

    try:
        activate_flash_attention_impl("FA3")
    except (ImportError, RuntimeError, ValueError) as error:
        logger.warning("torch cannot use the installed FlashAttention-3 (%s); falling back to FlashAttention-2", error)
        return False
    return True


def fa2_kernel() -> VarlenKernel:
    """The kernel of flash-attn version 2; deterministic if torch's deterministic algorithms are enabled.

    Raises:
        MissingDependencyError: If no flash_attn package is installed.
        ConfigError: If only another version is installed.
    """
    function = getattr(require("flash_attn", extra="flash"), "flash_attn_varlen_func", None)
    if function is None:
        only = "only flash_attn.cute (FlashAttention-4)" if find_spec("flash_attn.cute") else "neither"
        raise ConfigError(
            f"model.attention_backend=flash needs FlashAttention-2 or 3, but the installed flash_attn has {only}; "
            "pip install 'flowception[flash]', or use model.attention_backend=auto, which needs no package"
        )
    return partial(_call_fa2, function)


def _call_fa2(function: Callable[..., Tensor], *tensors_and_sizes: Any) -> Tensor:
    return function(*tensors_and_sizes, deterministic=torch.are_deterministic_algorithms_enabled())


def check_installed() -> None:
    """Check that flash-attn version 2 or 3 is installed, as ``attention_backend=flash`` requires.

    Raises:
        MissingDependencyError: If no version is installed.
        ConfigError: If only another version is installed.
    """
    if find_spec(_FA3_MODULE) is None:
        fa2_kernel()
