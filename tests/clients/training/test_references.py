"""Choosing the references that agree."""

from __future__ import annotations

from clients.data import Row
from clients.training.references import typical_rows

ODD = "Nobody knows anything about that place."
AGREE = (
    "Cocum is a cheap coffee shop by the river.",
    "Cocum is a cheap coffee shop near the river.",
    "By the river there is Cocum, a cheap coffee shop.",
)


def test_the_references_that_agree_are_kept_in_their_order() -> None:
    row = Row("name : Cocum", (AGREE[0], ODD, AGREE[1], AGREE[2]))
    assert typical_rows([row], 3) == (Row(row.source, AGREE),)
    assert typical_rows([row], 2) == (Row(row.source, AGREE[:2]),)


def test_rows_with_few_references_stay_as_they_are() -> None:
    rows = (Row("a", (ODD,)), Row("b", AGREE))
    assert typical_rows(rows, 3) == rows
