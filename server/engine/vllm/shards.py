"""Which heads a tensor-parallel rank has."""

from __future__ import annotations


def own_heads(total: int, rank: int, size: int) -> slice:
    """Key-value heads of one rank, as vLLM divides them.

    With more ranks than heads, neighbouring ranks have the same head.

    Args:
        total: heads of the whole model.
        size: number of ranks.
    """
    start = rank * total // size
    return slice(start, start + max(1, total // size))
