"""The C kernels of `kernels.c`, on CPU tensors.

Tensors are float32 or bfloat16, contiguous unless said otherwise. Nothing here allocates or checks;
the caller owns the shapes.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable
from typing import cast

import torch

MAX_QUERIES = 64
MAX_HEAD_DIM = 256
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class AttentionArguments(ctypes.Structure):
    """`Attention` of kernels_typed.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("queries", "output", "keys", "values")),
        *((name, _POINTER) for name in ("slots", "lengths")),
        *((name, _POINTER) for name in ("prefix_keys", "prefix_values", "prefix_lengths")),
        *((name, _INT) for name in ("layer", "rows", "num_heads", "kv_heads", "head_dim")),
        *((name, _INT) for name in ("query_stride", "slot_stride", "head_stride")),
        ("scale", _FLOAT),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they were not built."""
    spec = importlib.util.find_spec("server.engine.kernels._kernels")
    if spec is None or spec.origin is None:
        return None
    try:
        return ctypes.CDLL(spec.origin)
    except OSError:
        return None


class Kernels:
    """The kernels of one element type; arguments as in kernels_typed.h, tensors by address."""

    def __init__(self, compiled: ctypes.CDLL, dtype: torch.dtype) -> None:
        def kernel(name: str, *types: type) -> Callable[..., None]:
            function = getattr(compiled, f"{name}_{_SUFFIX[dtype]}")
            function.argtypes, function.restype = types, None
            return cast("Callable[..., None]", function)

        attention = ctypes.POINTER(AttentionArguments)
        self.attention = kernel("attention", attention, _INT, _POINTER)
        self.rotate_and_store = kernel("rotate_and_store", *[_POINTER] * 8, *[_INT] * 6)
        self.add_rms_norm = kernel("add_rms_norm", *[_POINTER] * 4, _INT, _INT, _FLOAT)
        self.silu_multiply = kernel("silu_multiply", *[_POINTER] * 2, *[_INT] * 2)
        self.argmax = kernel("argmax", *[_POINTER] * 3, *[_INT] * 2)


@functools.cache
def kernels_for(dtype: torch.dtype) -> Kernels | None:
    """The kernels of an element type, or None where there are none."""
    compiled = library()
    return Kernels(compiled, dtype) if compiled is not None and dtype in _SUFFIX else None


def likeliest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row, the first most likely token and the logarithm of the sum of exponentials.

    Args:
        logits: `[rows, vocab]` on any device, of any floating dtype.

    Returns:
        int64 `[rows]` and float32 `[rows]`; the latter is not finite where a logit is not.
    """
    kernels = kernels_for(logits.dtype) if logits.device.type == "cpu" else None
    if kernels is None:
        scores = logits.float()
        return scores.argmax(dim=-1), scores.logsumexp(dim=-1)
    rows, vocab = logits.shape
    logits = logits.contiguous()
    best = torch.empty(rows, dtype=torch.int64)
    normalizer = torch.empty(rows)
    kernels.argmax(logits.data_ptr(), best.data_ptr(), normalizer.data_ptr(), rows, vocab)
    return best, normalizer
