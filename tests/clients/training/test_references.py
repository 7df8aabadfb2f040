"""Choosing the references that agree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from clients.data import Row
from clients.training import TrainSettings, train
from clients.training.references import typical_rows
from prefix_store.model_loading import LoadedModel

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


def test_training_takes_the_chosen_references_only(
    load_tiny: Callable[[], LoadedModel], tmp_path: Path
) -> None:
    rows = [Row(f"name : {name}", (ODD, *AGREE)) for name in ("Cocum", "Cotto", "Aromi")]
    chosen = TrainSettings(prefix_length=3, max_steps=2, batch_size=2, references=1)
    every = chosen.model_copy(update={"references": None})
    by_option = train(chosen, load_tiny(), rows, tmp_path / "option", dev=rows)
    by_hand, few = typical_rows(rows, 1), tmp_path / "hand"
    expected = train(every, load_tiny(), by_hand, few, dev=by_hand)
    assert by_option.prefix is not None
    assert expected.prefix is not None
    assert torch.equal(by_option.prefix.keys, expected.prefix.keys)
    assert by_option.dev_loss == expected.dev_loss
