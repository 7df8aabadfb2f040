"""The files that are trained and scored on, made of E2E and WebNLG."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from benchmarks.common import data_file
from benchmarks.small_bart.noise import pretraining_rows, sentences
from clients.data import Row, detokenise, read_rows

SEED = 1
E2E, COMPRESSION = "e2e", "compression"
_DEV_ROWS = 400


def write_files(folder: Path, count: int) -> None:
    """Write `base`, `e2e` and `compression`, each as `NAME-train.jsonl` and `NAME-dev.jsonl`.

    Of E2E, the base sees the texts and the facts of training rows, but not which belong together.

    Args:
        count: rows for the base.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = read_texts()
    pairs = {part: _pairs(read_rows(data_file("webnlg", part))) for part in ("train", "dev")}
    _write(folder / "base-train.jsonl", pretraining_rows(pairs["train"], texts, count, SEED))
    dev_texts = [text for _, text in pairs["dev"]]
    dev = pretraining_rows(pairs["dev"], dev_texts, _DEV_ROWS, SEED)
    _write(folder / "base-dev.jsonl", dev)
    for part in ("train", "dev"):
        rows = read_rows(data_file("e2e", part))
        _write(folder / f"{E2E}-{part}.jsonl", map(_joined, rows))
        written = [text for _, text in pairs[part]]
        _write(folder / f"{COMPRESSION}-{part}.jsonl", compression_rows(written))


def read_texts() -> list[str]:
    """What people wrote for both, and E2E's facts as often as each has been put into words."""
    e2e = [_joined(row) for row in read_rows(data_file("e2e", "train"))]
    texts = [text for _, text in _pairs(read_rows(data_file("webnlg", "train")))]
    for row in e2e:
        texts += [*row.references, *[row.source] * len(row.references)]
    return texts


def compression_rows(texts: Iterable[str]) -> list[Row]:
    """A row for each text of several sentences; the first of them is its target."""
    split = ((text, sentences(text)) for text in dict.fromkeys(texts))
    return [Row(text, (parts[0],)) for text, parts in split if len(parts) > 1]


def _pairs(rows: Iterable[Row]) -> list[tuple[str, str]]:
    return [(row.source, text) for row in rows for text in row.references]


def _joined(row: Row) -> Row:
    return Row(row.source, tuple(map(detokenise, row.references)))


def _write(path: Path, rows: Iterable[Row]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            line = {"source": row.source, "references": row.references}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
