"""The rows of a run: E2E as it is, WebNLG with whole categories held out."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.common import data_file
from benchmarks.quality.plan import Run
from clients.data import Row, read_rows

HELD_OUT = ("Astronaut", "Food", "University")
"""WebNLG categories that no run is trained on."""


@dataclass(frozen=True, slots=True)
class Split:
    """What a run is trained on and scored on.

    Attributes:
        train: rows, each with one reference if they were drawn as pairs.
        dev: rows for the dev loss: of seen categories only.
        scored: rows to generate, by the name that their scores are shown under.
    """

    train: tuple[Row, ...]
    dev: tuple[Row, ...]
    scored: Mapping[str, tuple[Row, ...]]


def split(run: Run) -> Split:
    """The rows of a run; exits with a clear message where the data is not there."""
    if run.data == "webnlg":
        return _webnlg()
    train, dev = (read_rows(data_file("e2e", part)) for part in ("train", "dev"))
    if run.num_pairs is not None:
        train = _pairs(train, run.num_pairs, run.settings.seed)
    return Split(train, dev, {"dev": dev})


def _pairs(rows: Sequence[Row], count: int, seed: int) -> tuple[Row, ...]:
    pairs = [Row(row.source, (text,)) for row in rows for text in row.references]
    return tuple(random.Random(seed).sample(pairs, count))  # noqa: S311 - not cryptography


def _webnlg() -> Split:
    train = _by_category("train")
    dev = _by_category("dev")
    return Split(train["seen"], dev["seen"], dev)


def _by_category(part: str) -> dict[str, tuple[Row, ...]]:
    path = data_file("webnlg", part)
    # Cut as `read_rows` cuts: a JSON string may hold what `splitlines` takes for the end of a line.
    lines = filter(str.strip, path.read_text(encoding="utf-8").split("\n"))
    held_out = [json.loads(line)["category"] in HELD_OUT for line in lines]
    rows = read_rows(path)
    return {
        name: tuple(row for row, out in zip(rows, held_out, strict=True) if out == wanted)
        for name, wanted in (("seen", False), ("unseen", True))
    }
