"""A prefix on its way to the device; on a CPU, which is what the tests have."""

from __future__ import annotations

import pytest
import torch

from prefix_store.errors import InvalidPrefixError
from prefix_store.prefix import Prefix
from server.engine.device_copy import DeviceCopier

CPU = torch.device("cpu")


def a_prefix(dtype: torch.dtype, scale: float = 1.0) -> Prefix:
    keys = scale * torch.randn(2, 3, 5, 4)
    return Prefix.of(keys.to(dtype), keys.to(dtype), method="test", template="{source}")


async def test_a_prefix_arrives_in_the_models_dtype() -> None:
    prefix = a_prefix(torch.float32)
    copier = DeviceCopier(CPU, torch.bfloat16)
    for arrived in (await copier.copy(prefix), await copier.copy(copier.prepare(prefix))):
        assert arrived.keys.dtype == arrived.values.dtype == torch.bfloat16
        assert torch.equal(arrived.keys, prefix.keys.to(torch.bfloat16))
        assert arrived.template == prefix.template


async def test_a_prepared_prefix_is_not_copied_again() -> None:
    copier = DeviceCopier(CPU, torch.float16)
    prepared = copier.prepare(a_prefix(torch.float32))
    assert await copier.copy(prepared) is prepared


async def test_numbers_too_large_for_the_dtype_are_refused() -> None:
    copier = DeviceCopier(CPU, torch.float16)
    with pytest.raises(InvalidPrefixError, match="Inf"):
        copier.prepare(a_prefix(torch.float32, scale=1e9))
