"""Gives memory that was freed back to the operating system."""

from __future__ import annotations

import ctypes
import sys


def return_freed_memory() -> None:
    """Have the C library keep no freed memory for itself; nothing where it cannot.

    Loading a model frees about as much as the model has, and on several threads: glibc would keep
    a part of it, more or less from one start to the next (`man 3 malloc_trim`).
    """
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
