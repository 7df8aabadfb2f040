"""Rows become the token ids that a server would see, in batches with little padding."""

from __future__ import annotations

import pytest
import torch

from clients import TrainingError
from clients.data import Row
from clients.training.examples import (
    IGNORED,
    Example,
    Examples,
    LikeLengthSampler,
    collate,
    encode_rows,
)
from prefix_store.model_loading import LoadedModel

ROWS = [Row("name : Cotto", ("Cotto is here.", "It is Cotto.")), Row("food : Thai", ("Thai.",))]


def test_prompt_is_what_a_server_encodes_and_target_ends_in_eos(smollm2: LoadedModel) -> None:
    tokenizer = smollm2.tokenizer
    examples = encode_rows(ROWS, smollm2, "{source}\n", 100)
    assert len(examples) == 3
    assert list(examples[1].prompt_ids) == tokenizer.encode("name : Cotto\n")
    assert tokenizer.decode(list(examples[1].target_ids)) == "It is Cotto.<|im_end|>"


def test_first_reference_alone(smollm2: LoadedModel) -> None:
    examples = encode_rows(ROWS, smollm2, "", 100, every_reference=False)
    assert len(examples) == 2


def test_template_may_be_empty(smollm2: LoadedModel) -> None:
    [example, *_] = encode_rows(ROWS, smollm2, "", 100)
    assert list(example.prompt_ids) == smollm2.tokenizer.encode("name : Cotto")


def test_row_that_is_too_long_is_named(smollm2: LoadedModel) -> None:
    rows = [Row("a", ("b",)), Row("a " * 50, ("b",))]
    with pytest.raises(TrainingError, match=r"^row 2 has 5\d tokens .* positions for 20 beside"):
        encode_rows(rows, smollm2, "{source}\n", 20)


def test_empty_prompt_is_refused(smollm2: LoadedModel) -> None:
    with pytest.raises(TrainingError, match="row 1 has an empty prompt"):
        encode_rows([Row("", ("b",))], smollm2, "{source}", 20)


def test_batch_is_padded_on_the_right_and_labelled_on_targets_alone() -> None:
    batch = collate([Example((7, 8), (9, 2)), Example((5,), (2,))])
    assert batch["input_ids"].tolist() == [[7, 8, 9, 2], [5, 2, 0, 0]]
    assert batch["labels"].tolist() == [
        [IGNORED, IGNORED, 9, 2],
        [IGNORED, 2, IGNORED, IGNORED],
    ]
    assert batch["labels"].dtype == torch.int64


@pytest.fixture
def examples() -> Examples:
    return Examples([Example((1,) * (n % 7 + 1), (n,)) for n in range(50)])


def test_each_epoch_has_every_example_once_in_another_order(examples: Examples) -> None:
    sampler = LikeLengthSampler(examples, 8, seed=1)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert first == list(LikeLengthSampler(examples, 8, seed=1))
    assert first != list(LikeLengthSampler(examples, 8, seed=2))


def test_batches_have_rows_of_like_length_and_come_in_any_order(examples: Examples) -> None:
    order = list(LikeLengthSampler(examples, 8, seed=1))
    lengths = [
        [len(examples[index]) for index in order[start : start + 8]] for start in range(0, 48, 8)
    ]
    assert all(max(batch) - min(batch) <= 2 for batch in lengths)
    assert lengths != sorted(lengths)
    assert lengths != sorted(lengths, reverse=True)
