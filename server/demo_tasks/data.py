"""Read a data set of sources and references, and cut it into batches of token ids."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

_BATCHES_PER_GROUP = 50
_JOINS = (
    (re.compile(r"\s+([.,;:!?])"), r"\1"),
    (re.compile(r"\s*'\s*(s|t|re|ll|ve|d|m)\b"), r"'\1"),
    (re.compile(r"£\s+(?=\d)"), "£"),
    (re.compile(r"(?<=\w)\s+-\s*(?=\w)"), "-"),
    (re.compile(r"\s+"), " "),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One input and the texts that people wrote for it, at least one."""

    source: str
    references: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """One training sequence: the prompt's token ids, then the target's, ending in eos."""

    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.target_ids)


def read_rows(path: Path) -> tuple[Row, ...]:
    """Read a JSON lines file of `source` and `references`, the references detokenised."""
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return tuple(Row(r["source"], tuple(map(detokenise, r["references"]))) for r in rows)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, to say later what a prefix was trained on."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def detokenise(text: str) -> str:
    """Join what a tokeniser split: `£ 20 , it 's kid - friendly .` -> `£20, it's kid-friendly.`

    Text that was never split comes back as it is, but for runs of white space.
    """
    for pattern, replacement in _JOINS:
        text = pattern.sub(replacement, text)
    return text.strip()


def encode(tokenizer: PreTrainedTokenizerBase, template: str, source: str, target: str) -> Example:
    """Token ids of prompt and target, encoded apart as they are when a server gets the prompt."""
    eos = int(tokenizer.eos_token_id)
    return Example(
        prompt_ids=tuple(prompt_ids(tokenizer, template, source)),
        target_ids=(*tokenizer.encode(target, add_special_tokens=False), eos),
    )


def prompt_ids(tokenizer: PreTrainedTokenizerBase, template: str, source: str) -> list[int]:
    """Token ids of a source in its template."""
    ids: list[int] = tokenizer.encode(
        template.replace("{source}", source), add_special_tokens=False
    )
    return ids


def endless_batches(
    examples: Sequence[Example], batch_size: int, seed: int
) -> Iterator[list[Example]]:
    """Shuffled batches without end, each of examples of like length so that little is padding."""
    order = random.Random(seed)  # noqa: S311 - not cryptography
    while True:
        shuffled = order.sample(examples, len(examples))
        batches = list(_batches_of_like_length(shuffled, batch_size))
        order.shuffle(batches)
        yield from batches


def _batches_of_like_length(
    shuffled: Sequence[Example], batch_size: int
) -> Iterator[list[Example]]:
    group_size = batch_size * _BATCHES_PER_GROUP
    for start in range(0, len(shuffled), group_size):
        group = sorted(shuffled[start : start + group_size], key=len)
        for first in range(0, len(group), batch_size):
            yield group[first : first + batch_size]
