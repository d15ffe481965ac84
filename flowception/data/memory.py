"""Giving freed memory back to the system, where what was freed is large and every process of a node holds it."""

from __future__ import annotations

import ctypes


def give_back_freed_memory() -> None:
    """Give back what glibc keeps of freed memory; elsewhere nothing.

    Making an epoch's order of millions of clips takes five times what stays of it, and glibc keeps blocks of such
    sizes for later once some were freed: for good, and in each of a node's ranks.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
