"""Rows to compute in one batch, so that little of it is padding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator


def like_lengths(
    indices: Iterable[int], length: Callable[[int], int], most: int
) -> Iterator[list[int]]:
    """The indices in groups of like `length`, the shortest first.

    A group's padded size is at most `most`, unless one alone is longer.
    """
    group: list[int] = []
    for index in sorted(indices, key=length):
        own = length(index)
        shortest = length(group[0]) if group else own
        if group and (own * (len(group) + 1) > most or own > 2 * shortest + 8):
            yield group
            group = []
        group.append(index)
    if group:
        yield group
