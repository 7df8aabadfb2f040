"""Matrix products against float64, on the loops of this processor and on those of any."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from server.engine.kernels import kernels_for
from server.engine.packed_matrix import pack_linears, project, quantize

RELATIVE_ERROR = {torch.float32: 1e-6, torch.bfloat16: 4e-3}

pytestmark = pytest.mark.usefixtures("loops")


def linears(*columns: int, depth: int, dtype: torch.dtype, bias: bool) -> list[nn.Linear]:
    torch.manual_seed(depth)
    return [nn.Linear(depth, n, bias=bias, dtype=dtype) for n in columns]


def product(packed_by: list[nn.Linear], rows: torch.Tensor, **kind: bool) -> torch.Tensor:
    kernels = kernels_for(rows.dtype)
    assert kernels is not None
    with torch.inference_mode():
        return project(kernels.project, pack_linears(packed_by, **kind), rows, threads=2)


def exact(linear: nn.Linear, rows: torch.Tensor, *, int8: bool = False) -> torch.Tensor:
    weight = linear.weight.double()
    if int8:
        steps, scales = quantize(linear.weight)
        weight = steps.double() * scales.double()[:, None]
        scale = rows.double().abs().amax(1, keepdim=True) / 127
        rows = (rows.double() / scale).round() * scale
    bias = 0.0 if linear.bias is None else linear.bias.double()
    return rows.double() @ weight.T + bias


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert (found.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("dtype", RELATIVE_ERROR)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 17, 40])
def test_products_side_by_side(dtype: torch.dtype, bias: bool, rows: int) -> None:
    parts = linears(50, 7, 96, depth=130, dtype=dtype, bias=bias)
    x = torch.randn(rows, 130).to(dtype)
    expected = torch.cat([exact(part, x) for part in parts], dim=1)
    found = product(parts, x, int8=False)
    assert_close(found, expected, RELATIVE_ERROR[dtype])


@pytest.mark.parametrize("dtype", RELATIVE_ERROR)
@pytest.mark.parametrize("int8", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_gated_products(dtype: torch.dtype, int8: bool, bias: bool) -> None:
    gate, up = linears(70, 70, depth=64, dtype=dtype, bias=bias)
    x = torch.randn(11, 64).to(dtype)
    expected = nn.functional.silu(exact(gate, x, int8=int8)) * exact(up, x, int8=int8)
    found = product([gate, up], x, int8=int8, gated=True)
    assert_close(found, expected, 4e-3)


@pytest.mark.parametrize("dtype", RELATIVE_ERROR)
@pytest.mark.parametrize("depth", [64, 130])
@pytest.mark.parametrize("rows", [1, 9])
def test_int8_products_are_those_of_the_quantised_numbers(
    dtype: torch.dtype, depth: int, rows: int
) -> None:
    parts = linears(100, depth=depth, dtype=dtype, bias=True)
    x = torch.randn(rows, depth).to(dtype)
    expected = exact(parts[0], x, int8=True)
    # A number half-way between two steps may be rounded either way.
    assert_close(product(parts, x, int8=True), expected, 5e-3)


def test_int8_is_near_the_weights_it_came_from() -> None:
    parts = linears(100, depth=576, dtype=torch.float32, bias=False)
    x = torch.randn(4, 576)
    assert_close(product(parts, x, int8=True), exact(parts[0], x), 2e-2)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_row_stays_broken_and_alone(broken: float) -> None:
    parts = linears(48, depth=64, dtype=torch.float32, bias=False)
    x = torch.randn(3, 64)
    x[1, 5] = broken
    found = product(parts, x, int8=True)
    assert found[1].isnan().all()
    assert_close(found[[0, 2]], exact(parts[0], x[[0, 2]], int8=True), 5e-3)


def test_a_row_of_zeros_is_the_bias() -> None:
    parts = linears(48, depth=64, dtype=torch.float32, bias=True)
    found = product(parts, torch.zeros(2, 64), int8=True)
    torch.testing.assert_close(found, parts[0].bias.detach().expand(2, -1))
