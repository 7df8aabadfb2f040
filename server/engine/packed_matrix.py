"""Weights in the layout of the CPU kernels' matrix products."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from server.engine.kernels import PANEL, structures


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """Weights `[columns, depth]` as panels (`Matrix` in kernels/structures.h).

    Attributes:
        packed: `[panels, units, PANEL, elements per unit]`; a unit is 32 bits along the depth.
        bias, scales: float32 `[panels * PANEL]` or None; scales where the weights are int8.
        offsets: int32 `[panels * PANEL]` where the weights are int8, else None.
        gated: the panels are a gate's and an up projection's by turns, and the product is
            `silu(gate) * up`.
    """

    packed: torch.Tensor
    bias: torch.Tensor | None
    scales: torch.Tensor | None
    offsets: torch.Tensor | None
    columns: int
    depth: int
    gated: bool

    @property
    def structure(self) -> structures.Matrix:
        """What the kernels take; valid while this object lives."""
        optional = (self.bias, self.scales, self.offsets)
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in optional]
        units = self.packed.shape[1]
        return structures.Matrix(
            self.packed.data_ptr(), *addresses, self.columns, units, int(self.gated)
        )


def pack_linears(linears: Sequence[Any], *, int8: bool, gated: bool = False) -> PackedMatrix:
    """One matrix of linears that share their input: side by side, or (gate, up) if `gated`.

    Args:
        int8: quantise to 8 bits, symmetrically per output.
    """
    weights = [linear.weight.detach() for linear in linears]
    biases = [_bias(linear) for linear in linears]
    has_bias = any(linear.bias is not None for linear in linears)
    if not gated:
        weights, biases = [torch.cat(weights)], [torch.cat(biases)]
    columns, depth = weights[0].shape
    weight, bias = _by_turns(weights), _by_turns(biases)
    scales = offsets = None
    if int8:
        weight, scales = quantize(weight)
        offsets = -128 * weight.sum(1, dtype=torch.int32)
    return PackedMatrix(
        packed=_panels(weight),
        bias=bias if has_bias else None,
        scales=scales,
        offsets=offsets,
        columns=columns,
        depth=depth,
        gated=gated,
    )


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 `[columns, depth]` and float32 `[columns]`, whose product is nearly `weight`."""
    weight = weight.float()
    scales = weight.abs().amax(1) / 127
    steps = torch.where(scales > 0, scales, 1.0)
    return (weight / steps[:, None]).round().to(torch.int8), scales


def _bias(linear: Any) -> torch.Tensor:
    if linear.bias is None:
        return torch.zeros(linear.out_features)
    bias: torch.Tensor = linear.bias.detach().float()
    return bias


def _by_turns(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Each part padded to whole panels along its first dimension, then panels by turns."""
    panels = []
    for part in parts:
        missing = -len(part) % PANEL
        padded = pad(part, (0, 0) * (part.ndim - 1) + (0, missing))
        panels.append(padded.view(-1, PANEL, *part.shape[1:]))
    return torch.stack(panels, dim=1).flatten(0, 2).contiguous()


def _panels(weight: torch.Tensor) -> torch.Tensor:
    """`[panels * PANEL, depth]` to `[panels, units, PANEL, elements per unit]`."""
    per_unit = 4 // weight.element_size()
    weight = pad(weight, (0, -weight.shape[1] % per_unit))
    split = weight.view(-1, PANEL, weight.shape[1] // per_unit, per_unit)
    return split.permute(0, 2, 1, 3).contiguous()


def project(kernel: Any, matrix: PackedMatrix, rows: torch.Tensor, threads: int) -> torch.Tensor:
    """`rows [count, depth]` times the matrix, `[count, columns]`, by `Kernels.project`."""
    count = len(rows)
    result = torch.empty(count, matrix.columns, dtype=rows.dtype)
    room = QuantizedRoom(count, matrix.depth)
    kernel(
        ctypes.byref(matrix.structure),
        rows.data_ptr(),
        matrix.depth,
        count,
        result.data_ptr(),
        ctypes.byref(room.structure),
        threads,
    )
    return result


class QuantizedRoom:
    """Memory for quantised rows of `depth` numbers."""

    def __init__(self, rows: int, depth: int) -> None:
        self._rows = torch.empty(rows, depth + 3, dtype=torch.uint8)
        self._scales = torch.empty(rows)

    @property
    def structure(self) -> structures.Quantized:
        """What the kernels take; valid while this object lives."""
        return structures.Quantized(self._rows.data_ptr(), self._scales.data_ptr())
