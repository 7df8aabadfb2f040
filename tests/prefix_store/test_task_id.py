"""Which names a task may have."""

from __future__ import annotations

import pytest

from prefix_store.errors import InvalidTaskIdError
from prefix_store.task_id import check_task_id


@pytest.mark.parametrize("task_id", ["e2e", "a", "7", "Web-NLG_2.1", "x" * 128])
def test_takes(task_id: str) -> None:
    assert check_task_id(task_id) == task_id


@pytest.mark.parametrize(
    "task_id",
    ["", ".", "..", "-a", "_a", "a/b", "a b", "a\n", "a\x00", "{a}", "a*", "é", "٣", "x" * 129],
)
def test_refuses(task_id: str) -> None:
    with pytest.raises(InvalidTaskIdError, match="expected 1 to 128 characters"):
        check_task_id(task_id)


def test_a_long_name_is_shortened_in_the_message() -> None:
    with pytest.raises(InvalidTaskIdError, match=r"\(100000 characters\)") as caught:
        check_task_id("x" * 100_000)

    assert len(str(caught.value)) < 200
