"""A prefix as transformers' `past_key_values`, for training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class _PrefixLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Puts the prefix in front and keeps nothing.

    A layer that gradient checkpointing runs a second time thus sees what it saw the first time.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self.keys, self.values = self.prefix = keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.prefix
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


def prefix_cache(keys_values: Tensor, batch_size: int, dtype: torch.dtype) -> DynamicCache:
    """A cache with the prefix in every row, through which gradients reach it.

    Args:
        keys_values: `[2, num_layers, num_kv_heads, prefix_length, head_dim]`.
        dtype: that the model computes in.
    """
    keys, values = keys_values.to(dtype)
    cache = DynamicCache()
    for key, value in zip(keys, values, strict=True):
        rows = (batch_size, -1, -1, -1)
        cache.layers.append(_PrefixLayer(key.expand(rows), value.expand(rows)))
    return cache
