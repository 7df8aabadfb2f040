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

from server.engine.kernels.structures import INT, POINTER, Matrix, Model, Quantized, Step

PANEL = 48
MAX_QUERIES = 64
MAX_HEAD_DIM = 256
LANES = 16
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


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
    """The kernels of one element type; arguments as in the C headers, tensors by address."""

    def __init__(self, compiled: ctypes.CDLL, dtype: torch.dtype) -> None:
        def kernel(name: str, *types: type) -> Callable[..., None]:
            function = getattr(compiled, f"{name}_{_SUFFIX[dtype]}")
            function.argtypes, function.restype = types, None
            return cast("Callable[..., None]", function)

        matrix, quantized = ctypes.POINTER(Matrix), ctypes.POINTER(Quantized)
        self.layers = kernel("layers", ctypes.POINTER(Model), ctypes.POINTER(Step))
        self.project = kernel("project", matrix, POINTER, INT, INT, POINTER, quantized, INT)
        self.argmax = kernel("argmax", *[POINTER] * 3, *[INT] * 2)


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
