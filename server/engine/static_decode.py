"""Decode steps of a few fixed shapes, so that each can be captured once and replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import product

import torch
from torch import Tensor

from server.engine.kv_cache import Window

Step = Callable[[], Tensor]
"""Computes logits `[rows, vocab]` of what its input buffers hold."""
Capture = Callable[[Step], Step]
"""Makes a step that reads and writes the same memory, faster."""
Forward = Callable[[Tensor, Tensor, Window], Tensor]

_SHORTEST = 256


class StaticDecode:
    """One token for each of the first slots, in buffers that stay where they are.

    A step is computed for the next larger number of rows, and over the next larger number of
    positions, of those that were prepared: powers of two, and the most there can be. Rows that
    nobody asked for write to scratch and see one position.
    """

    def __init__(
        self,
        forward: Forward,
        *,
        max_slots: int,
        max_length: int,
        scratch: int,
        device: torch.device,
        capture: Capture,
    ) -> None:
        """Prepare every shape, the largest first.

        Args:
            forward: logits `[rows, vocab]` from token ids and positions, int64 `[rows, 1]`, and the
                window of memory to read and write.
            scratch: position that nothing reads.
            capture: given each shape's step, whose buffers hold scratch rows at that time.
        """
        self._row_sizes = buckets(1, max_slots)
        self._lengths = buckets(min(_SHORTEST, max_length), max_length)
        self._scratch = scratch
        # Token ids, positions and where to write; through page-locked memory to a GPU.
        self._host = torch.zeros(3, max_slots, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._host[2] = scratch
        self._inputs = self._host.to(device, copy=True)

        def step(rows: int, length: int) -> Step:
            ids, positions, write_at = (row[:rows, None] for row in self._inputs)
            window = Window(slice(0, rows), write_at, length)
            return lambda: forward(ids, positions, window)

        shapes = sorted(product(self._row_sizes, self._lengths), reverse=True)
        self._steps = {shape: capture(step(*shape)) for shape in shapes}

    @property
    def shapes(self) -> frozenset[tuple[int, int]]:
        """Numbers of rows and positions that are prepared."""
        return frozenset(self._steps)

    def __call__(
        self, slots: Sequence[int], tokens: Iterable[int], starts: Sequence[int]
    ) -> Tensor:
        """Logits `[slots, vocab]`, valid until the next call.

        Args:
            slots: slots with a token, in any order.
            tokens, starts: of each, its token id and the position that it takes.
        """
        rows = _at_least(max(slots) + 1, self._row_sizes)
        length = _at_least(max(starts) + 1, self._lengths)
        self._host[:2] = 0
        self._host[2] = self._scratch
        self._host[:, slots] = torch.tensor([list(tokens), starts, starts])
        self._inputs.copy_(self._host, non_blocking=True)
        return self._steps[rows, length]()[slots]


def buckets(smallest: int, largest: int) -> tuple[int, ...]:
    """`smallest`, twice that, four times that and so on below `largest`, and `largest`."""
    sizes = []
    size = smallest
    while size < largest:
        sizes.append(size)
        size *= 2
    return (*sizes, largest)


def _at_least(wanted: int, sizes: Sequence[int]) -> int:
    return next(size for size in sizes if size >= wanted)
