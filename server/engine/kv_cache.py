"""The KV memory of every slot, worn as a transformers `Cache`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache

from prefix_store.base_model import BaseModelSpec
from prefix_store.groups import KeysValues
from server.engine.beam_search import Reordering


@dataclass(frozen=True, slots=True)
class Window:
    """Which part of the memory one forward pass sees.

    Attributes:
        rows: the slots of the batch's rows: the first `n` as a slice (read without a copy), or any
            as an int64 tensor `[batch]`.
        write_at: int64 `[batch, tokens]`, the position each new key and value goes to.
        length: positions of each slot that attention reads.
    """

    rows: slice | torch.Tensor
    write_at: torch.Tensor
    length: int


class SlotCache(Cache):
    """Keys and values `[num_layers, max_slots, num_kv_heads, max_length + 1, head_dim]`.

    A sequence's prefix, prompt and output lie at positions 0, 1, 2, ... of its slot, so the
    position of a token is also its index here. The last position is scratch: padding is written
    there and nothing reads it. `select` a window, then give the cache to the model's forward.
    """

    def __init__(
        self,
        spec: BaseModelSpec,
        max_slots: int,
        max_length: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(layers=[])
        shape = (spec.num_layers, max_slots, spec.num_kv_heads, max_length + 1, spec.head_dim)
        # Zeros, for attention multiplies what it masks out by 0, and 0 x NaN is NaN.
        self.keys = _zeros(shape, device, dtype)
        self.values = _zeros(shape, device, dtype)
        self.scratch = max_length
        self._slot_index = torch.arange(max_slots, device=device)
        self._window: Window | None = None

    def select(self, window: Window) -> None:
        """Make the next forward pass read and write `window`."""
        self._window = window

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's new keys and values, `[batch, num_kv_heads, tokens, head_dim]` each.

        Returns the window's keys and values, `[batch, num_kv_heads, length, head_dim]`.
        """
        window = self._window
        if window is None:
            raise RuntimeError("SlotCache.select() must come before the forward pass")
        return (
            self._store(self.keys[layer_idx], key_states, window),
            self._store(self.values[layer_idx], value_states, window),
        )

    def _store(self, memory: torch.Tensor, states: torch.Tensor, window: Window) -> torch.Tensor:
        rows = self._slot_index[window.rows] if isinstance(window.rows, slice) else window.rows
        memory[rows[:, None], :, window.write_at] = states.transpose(1, 2)
        return memory[window.rows, :, : window.length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: positions and masks are given to the model, never derived from the cache."""
        return 0

    def write_prefix(self, slot: int, prefix: KeysValues) -> None:
        """Put a prefix at the slot's first positions."""
        end = prefix.prefix_length
        self.keys[:, slot, :, :end].copy_(prefix.keys)
        self.values[:, slot, :, :end].copy_(prefix.values)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot over another's."""
        self.keys[:, target, :, :length].copy_(self.keys[:, source, :, :length])
        self.values[:, target, :, :length].copy_(self.values[:, source, :, :length])

    def reorder(self, reordering: Reordering) -> None:
        """Copy positions of slots over those of other slots, all at once."""
        sources, targets = list(reordering.sources), list(reordering.targets)
        changed = slice(reordering.start, reordering.end)
        for memory in (self.keys, self.values):
            memory[:, targets, :, changed] = memory[:, sources, :, changed]

    def clear(self, slot: int) -> None:
        """Zero a slot that may hold NaN or infinities, which a later occupant would inherit."""
        self.keys[:, slot].zero_()
        self.values[:, slot].zero_()


class CrossCache(SlotCache):
    """The keys and values of encoders' outputs; once written, attention reads them from `layers`.

    `select` a window whose `write_at` nobody uses to read what is there.
    """

    def select(self, window: Window) -> None:
        super().select(window)
        layers: list[Any] = [  # all that is asked of a layer is its keys and values
            _CrossLayer(*(memory[window.rows, :, : window.length] for memory in memories))
            for memories in zip(self.keys, self.values, strict=True)
        ]
        self.layers = layers


@dataclass(frozen=True, slots=True)
class _CrossLayer:
    """What a layer's attention to the encoder reads: `[batch, num_kv_heads, length, head_dim]`."""

    keys: torch.Tensor
    values: torch.Tensor


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Zeros; on the CPU of pages that the operating system provides when they are first used."""
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    return (
        torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8))
        .view(dtype)
        .view(shape)
    )
