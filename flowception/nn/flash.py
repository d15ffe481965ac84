"""Which FlashAttention is installed: the packages share a name, and what one holds the other lacks.

* Version 2 is built into torch; the package ``flash-attn`` brings it a second time (``flash_attn_varlen_func``).
* Version 3, for Hopper GPUs, is a package of its own (module ``flash_attn_interface``). torch calls it in place of its
  own version 2 once it is activated (``torch.nn.attention.activate_flash_attention_impl``).
* Version 4 (``flash-attn-4``) puts ``flash_attn.cute`` alone into the same place as version 2.

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
    """Attention within segments by a kernel for variable lengths."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, /
    ) -> Tensor:
        """``[T, H, d]`` three times, boundaries int32 ``[S + 1]`` and longest segments, to ``[T, H, d]``."""


@lru_cache(maxsize=1)
def activate_fa3() -> bool:
    """Let torch use FlashAttention-3 where its package is installed and the GPU is one that it is for.

    Returns:
        Whether torch does so now.
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
    """The kernel of the flash-attn package, version 2; deterministic where torch is asked to be.

    Raises:
        MissingDependencyError: If there is no package of that name.
        ConfigError: If it is another version.
    """
    function = getattr(require("flash_attn", extra="flash"), "flash_attn_varlen_func", None)
    if function is None:
        only = "only flash_attn.cute (FlashAttention-4)" if find_spec("flash_attn.cute") else "neither"
        raise ConfigError(
            f"attention_backend=flash needs FlashAttention-2 or 3, but the installed flash_attn has {only}; "
            "pip install 'flowception[flash]', or use attention_backend=auto, which needs no package"
        )
    return partial(_call_fa2, function)


def _call_fa2(function: Callable[..., Tensor], *tensors_and_sizes: Any) -> Tensor:
    return function(*tensors_and_sizes, deterministic=torch.are_deterministic_algorithms_enabled())


def check_installed() -> None:
    """Refuse ``attention_backend=flash`` where neither version 2 nor version 3 is installed.

    Raises:
        MissingDependencyError: If there is none.
        ConfigError: If there is another version.
    """
    if find_spec(_FA3_MODULE) is None:
        fa2_kernel()
