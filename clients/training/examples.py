"""Rows as token ids, cut into batches of like length."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler

from clients._errors import TrainingError
from clients.data import Row
from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import SOURCE

IGNORED = -100
"""Label of a position that is not trained on."""
_BATCHES_PER_GROUP = 50


@dataclass(frozen=True, slots=True)
class Example:
    """One training sequence: the prompt's token ids, then the target's, ending in eos.

    With an encoder, the prompt is what that reads.
    """

    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.target_ids)


class Examples(Dataset[Example]):
    """Examples in a fixed order."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = tuple(examples)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


def encode_rows(
    rows: Sequence[Row],
    loaded: LoadedModel,
    template: str,
    longest: int,
    *,
    every_reference: bool = True,
) -> Examples:
    """Examples of prompt and target, tokenized apart, as a server gets the prompt.

    Args:
        longest: most tokens of prompt and target together; of each, with an encoder.
        every_reference: an example for each reference of a row, or for its first alone.

    Raises:
        TrainingError: a row has no prompt, or is too long; says which.
    """
    examples, tokenizer = [], loaded.tokenizer
    has_encoder = loaded.spec.encoder is not None
    for number, row in enumerate(rows, 1):
        text = template.replace(SOURCE, row.source) if template else row.source
        prompt = tokenizer.encode(text)
        for reference in row.references if every_reference else row.references[:1]:
            # A decoder of its own begins a text as its tokenizer does.
            target = tokenizer.encode(reference, add_special_tokens=has_encoder)
            if target[-1:] != [tokenizer.eos_token_id]:
                target.append(tokenizer.eos_token_id)
            example = Example(tuple(prompt), tuple(target))
            _check(number, example, longest, has_encoder=has_encoder)
            examples.append(example)
    return Examples(examples)


def _check(number: int, example: Example, longest: int, *, has_encoder: bool) -> None:
    if not example.prompt_ids:
        raise TrainingError(
            f"row {number} has an empty prompt; expected a token at least. Put some text around "
            f"{SOURCE} in the template."
        )
    of_each = max(len(example.prompt_ids), len(example.target_ids))
    if (of_each if has_encoder else len(example)) > longest:
        raise TrainingError(
            f"row {number} has {len(example)} tokens ({len(example.prompt_ids)} of the prompt and "
            f"{len(example.target_ids)} of the target); the model has positions for {longest} "
            f"{'of each ' if has_encoder else ''}beside the prefix. Shorten the row or leave it "
            "out."
        )


def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
    """A batch, padded on the right: `input_ids` and `labels`, int64 `[rows, tokens]`.

    No mask is needed: attention is causal, so no target sees the padding behind it.
    """
    width = max(map(len, examples))
    input_ids = torch.zeros(len(examples), width, dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORED)
    for row, example in enumerate(examples):
        start, end = len(example.prompt_ids), len(example)
        input_ids[row, :end] = torch.tensor(example.prompt_ids + example.target_ids)
        labels[row, start:end] = input_ids[row, start:end]
    return {"input_ids": input_ids, "labels": labels}


def collate_pairs(examples: Sequence[Example]) -> dict[str, Tensor]:
    """A batch for a model with an encoder, padded on the right.

    Its sources are `input_ids` and `attention_mask`, 1 where a token is; its targets `labels`; all
    int64 `[rows, tokens]`.
    """
    prompts = [torch.tensor(example.prompt_ids) for example in examples]
    targets = [torch.tensor(example.target_ids) for example in examples]
    present = [torch.ones_like(prompt) for prompt in prompts]
    return {
        "input_ids": pad_sequence(prompts, batch_first=True),
        "attention_mask": pad_sequence(present, batch_first=True),
        "labels": pad_sequence(targets, batch_first=True, padding_value=IGNORED),
    }


class LikeLengthSampler(Sampler[int]):
    """Each epoch in another order, in which every batch has rows of like length.

    Little of a batch is padding then, and the batches themselves come in random order, which
    transformers' own sampler does not do.
    """

    def __init__(self, examples: Examples, batch_size: int, seed: int) -> None:
        self._lengths = [len(example) for example in examples.examples]
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; the Trainer calls it, when it resumes too."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        order = random.Random(f"{self._seed} {self._epoch}")  # noqa: S311 - not cryptography
        shuffled = order.sample(range(len(self)), len(self))
        batches = [
            batch
            for group in _chunks(shuffled, self._batch_size * _BATCHES_PER_GROUP)
            for batch in _chunks(sorted(group, key=self._lengths.__getitem__), self._batch_size)
        ]
        # The last may be short, and the Trainer cuts batches by counting.
        *full, last = batches
        order.shuffle(full)
        for batch in (*full, last):
            yield from batch


def _chunks(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
