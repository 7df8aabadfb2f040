"""What the base model is trained on: texts to be repaired, and facts to be put into words.

Texts are repaired as BART's are (Lewis et al. 2020): spans of words, their lengths drawn from a
Poisson distribution, give way to one mask each, and sentences come in any order. Facts are those of
WebNLG, half of those about one thing written as attributes (`name : ... | city served : ...`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from clients.data import Row

MASK = "<mask>"
_MASK_RATE, _SPAN_WORDS = 0.13, 3  # about a third of the words
_SENTENCE_END = re.compile(r"""(?<=[a-z0-9)"'][a-z0-9)"'][.!?])\s+(?=[A-Z"])""")
_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")
_FACTS, _ATTRIBUTES = 0.5, 0.5


def pretraining_rows(
    pairs: Sequence[tuple[str, str]], texts: Sequence[str], count: int, seed: int
) -> Iterator[Row]:
    """So many rows, half of them facts, the others texts with noise.

    Args:
        pairs: WebNLG's facts, and what someone wrote of them.
        texts: to be repaired.
    """
    draw = np.random.default_rng(seed)
    every_pair, every_text = _passes(len(pairs), draw), _passes(len(texts), draw)
    for _ in range(count):
        if draw.random() < _FACTS:
            source, text = pairs[next(every_pair)]
            yield Row(styled(source, draw), (text,))
        else:
            text = texts[next(every_text)]
            yield Row(noised(text, draw), (text,))


def _passes(count: int, draw: np.random.Generator) -> Iterator[int]:
    """Every index once, then again in another order, and so on."""
    while True:
        yield from map(int, draw.permutation(count))


def sentences(text: str) -> list[str]:
    """A text's sentences; a dot behind a single letter or a short title ends none."""
    return _SENTENCE_END.split(text.strip())


def noised(text: str, draw: np.random.Generator) -> str:
    """The text with its sentences in any order and masks for spans of its words."""
    parts = sentences(text)
    words = " ".join(parts[i] for i in draw.permutation(len(parts))).split()
    found, at = [], 0
    while at < len(words):
        if draw.random() < _MASK_RATE:
            found.append(MASK)
            at += int(draw.poisson(_SPAN_WORDS))
        if at < len(words):
            found.append(words[at])
            at += 1
    return " ".join(found)


def styled(source: str, draw: np.random.Generator) -> str:
    """WebNLG's facts as they are, or as attributes of the one thing that they are about."""
    facts = [fact.split(" | ") for fact in source.split(" && ")]
    if len({subject for subject, _, _ in facts}) > 1 or draw.random() >= _ATTRIBUTES:
        return source
    attributes = [("name", facts[0][0]), *((name, value) for _, name, value in facts)]
    return " | ".join(f"{_words(name)} : {_plain(value)}" for name, value in attributes)


def _words(name: str) -> str:
    return _HUMP.sub(" ", _plain(name)).lower()


def _plain(value: str) -> str:
    return value.replace("_", " ").strip('" ')
