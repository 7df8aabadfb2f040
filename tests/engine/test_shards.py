"""Which heads of a prefix each tensor-parallel rank loads."""

from __future__ import annotations

import pytest

from server.engine.vllm.shards import own_heads


@pytest.mark.parametrize(("total", "size"), [(8, 1), (8, 2), (8, 8), (2, 2), (3, 1)])
def test_the_ranks_share_out_the_heads(total: int, size: int) -> None:
    parts = [list(range(total))[own_heads(total, rank, size)] for rank in range(size)]
    assert [head for part in parts for head in part] == list(range(total))
    assert {len(part) for part in parts} == {total // size}


def test_with_more_ranks_than_heads_neighbours_have_the_same() -> None:
    parts = [list(range(2))[own_heads(2, rank, 8)] for rank in range(8)]
    assert parts == [[0]] * 4 + [[1]] * 4
