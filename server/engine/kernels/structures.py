"""The structures of `structures.h`, and tensors as their fields.

A structure holds addresses; whoever makes one keeps the tensors.
"""

from __future__ import annotations

import ctypes

POINTER, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class Matrix(ctypes.Structure):
    """Packed weights."""

    _fields_ = (
        ("packed", POINTER),
        ("bias", POINTER),
        ("scales", POINTER),
        ("offsets", POINTER),
        ("columns", INT),
        ("units", INT),
        ("gated", INT),
    )


class Layer(ctypes.Structure):
    """One decoder layer's weights."""

    _fields_ = (
        ("input_norm", POINTER),
        ("mlp_norm", POINTER),
        ("qkv", Matrix),
        ("output", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
    )


class Model(ctypes.Structure):
    """Every layer, and what they share."""

    _fields_ = (
        ("layers", ctypes.POINTER(Layer)),
        ("norm", POINTER),
        ("cosine", POINTER),
        ("sine", POINTER),
        *((name, INT) for name in ("num_layers", "hidden_size", "num_heads")),
        *((name, INT) for name in ("kv_heads", "head_dim")),
        ("epsilon", FLOAT),
        ("scale", FLOAT),
    )


class Quantized(ctypes.Structure):
    """Room for a product's quantised rows."""

    _fields_ = (("rows", POINTER), ("scales", POINTER))


class Step(ctypes.Structure):
    """The rows of one step and the memory they work in."""

    _fields_ = (
        *((name, POINTER) for name in ("slots", "indices", "positions", "lengths")),
        *((name, POINTER) for name in ("prefix_keys", "prefix_values", "prefix_lengths")),
        *((name, POINTER) for name in ("groups", "keys", "values")),
        *((name, INT) for name in ("layer_stride", "slot_stride", "head_stride")),
        *((name, POINTER) for name in ("residual", "normed", "delta", "qkv", "mixed", "gated")),
        ("quantized", Quantized),
        *((name, INT) for name in ("rows", "rows_per_group", "threads")),
    )
