"""Data files for training and evaluation: sources, and the texts that people wrote for them.

JSON lines, one object a line with `source` and either `target`, one text, or `references`, several;
or CSV, if the name ends in `.csv`, with a heading that names `source` and `target`. Other columns
are ignored.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from clients._errors import PrefixServeError

_JOINS = (
    (re.compile(r"\s+([.,;:!?])"), r"\1"),
    (re.compile(r"\s*'\s*(s|t|re|ll|ve|d|m)\b"), r"'\1"),
    (re.compile(r"£\s+(?=\d)"), "£"),
    (re.compile(r"(?<=\w)\s+-\s*(?=\w)"), "-"),
    (re.compile(r"\s+"), " "),
)


class DataError(PrefixServeError, ValueError):
    """A data file cannot be used; its text is one sentence with the file and the line."""


@dataclass(frozen=True, slots=True)
class Row:
    """One input and the texts that people wrote for it, at least one; none of them is blank."""

    source: str
    references: tuple[str, ...]


def read_rows(path: Path) -> tuple[Row, ...]:
    """The rows of a data file in their order; rows of equal source stay apart.

    Raises:
        DataError: the file cannot be read, is not UTF-8 or has no rows, or a row is not as above.
    """
    text = _text_of(path)
    rows = tuple(_csv_rows(path, text) if path.suffix.lower() == ".csv" else _json_rows(path, text))
    if not rows:
        raise DataError(f"{path} has no rows")
    return rows


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, which names the data in what is made from it.

    Raises:
        DataError: the file cannot be read.
    """
    return hashlib.sha256(_bytes_of(path)).hexdigest()


def detokenise(text: str) -> str:
    """Join what a tokeniser split: `£ 20 , it 's kid - friendly .` -> `£20, it's kid-friendly.`

    For data such as E2E's. Text that was never split comes back as it is, but for white space.
    """
    for pattern, replacement in _JOINS:
        text = pattern.sub(replacement, text)
    return text.strip()


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _text_of(path: Path) -> str:
    data = _bytes_of(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path} is not UTF-8 text: line {line} is the first that is not"
        ) from error


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    # Not `splitlines`, which also splits at characters that a JSON string may hold, such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _json_row(line, f"{path}, line {number}")


def _json_row(line: str, where: str) -> Row:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise DataError(f"{where} is not a JSON object with source and target, but {line[:40]!r}")
    if "source" not in fields or ("target" in fields) == ("references" in fields):
        raise DataError(
            f"{where} has {_listed(fields)}; it needs source and either target or references"
        )
    references = fields["references"] if "references" in fields else [fields["target"]]
    if not isinstance(references, list) or not references:
        raise DataError(f"{where}: references must be a list of at least one text")
    name = "reference" if "references" in fields else "target"
    return Row(
        _checked(fields["source"], "source", where),
        tuple(_checked(reference, name, where) for reference in references),
    )


def _csv_rows(path: Path, text: str) -> Iterator[Row]:
    lines = csv.reader(StringIO(text, newline=""), strict=True)
    try:
        heading = next(lines, [])
        if heading and not {"source", "target"} <= set(heading):
            raise DataError(f"{path} has {_listed(heading)}; it needs source and target")
        for values in filter(None, lines):
            where = f"{path}, line {lines.line_num}"
            if len(values) != len(heading):
                raise DataError(f"{where} has {len(values)} fields; the heading has {len(heading)}")
            fields = dict(zip(heading, values, strict=True))
            source, target = (_checked(fields[name], name, where) for name in ("source", "target"))
            yield Row(source, (target,))
    except csv.Error as error:
        raise DataError(f"{path}, line {lines.line_num} is not CSV: {error}") from error


def _listed(columns: Collection[str]) -> str:
    return f"columns {', '.join(columns)[:200]}" if columns else "no columns"


def _checked(value: object, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: the {name} must be a text, and is {json.dumps(value)[:40]}")
    if not value.strip():
        raise DataError(f"{where} has an empty {name}")
    if not _is_unicode(value):
        raise DataError(f"{where}: the {name} has half a character (a lone surrogate)")
    return value


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
