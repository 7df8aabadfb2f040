"""Data files: what is read, and the one sentence that a file which cannot be used gets."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients import PrefixServeError
from clients.data import DataError, Row, detokenise, read_rows, sha256_of

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(str.strip)


def data_file(folder: Path, content: str | bytes, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_json_lines_of_a_target_and_of_references(tmp_path: Path) -> None:
    lines = [
        {"source": "a", "target": "b", "category": "ignored"},
        {"source": "a", "references": ["c", "d"]},
    ]
    path = data_file(tmp_path, "\n\n".join(map(json.dumps, lines)) + "\n")
    assert read_rows(path) == (Row("a", ("b",)), Row("a", ("c", "d")))


@pytest.mark.parametrize(
    "content", ["target,source\nb,a\nc,a\n", "\ufefftarget,source\r\nb,a\r\nc,a"]
)
def test_csv_rows_of_equal_source_stay_apart(tmp_path: Path, content: str) -> None:
    path = data_file(tmp_path, content, "rows.CSV")
    assert read_rows(path) == (Row("a", ("b",)), Row("a", ("c",)))


@given(rows=st.lists(st.tuples(TEXTS, TEXTS), min_size=1))
def test_any_text_is_read_as_it_was_written(
    rows: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    expected = tuple(Row(source, (target,)) for source, target in rows)
    lines = (
        json.dumps({"source": source, "target": target}, ensure_ascii=False)
        for source, target in rows
    )
    assert read_rows(data_file(folder, "\n".join(lines))) == expected
    path = folder / "rows.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("source", "target"), *rows])
    assert read_rows(path) == expected


GOOD = '{"source": "a", "target": "b"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "{path} has no rows"),
        (" \n\n", "{path} has no rows"),
        (GOOD + "{source", "{path}, line 2 is not JSON: Expecting property name"),
        ("[" * 100_000, "{path}, line 1 is not JSON: "),
        (GOOD + '\n"a"', "{path}, line 3 is not a JSON object with source and target, but '\"a\"'"),
        (
            GOOD + '{"input": "a", "target": "b"}',
            "{path}, line 2 has columns input, target; it needs source and either target or "
            "references",
        ),
        ("{}", "{path}, line 1 has no columns; it needs source and either target or references"),
        (
            '{"source": "a", "target": "b", "references": ["b"]}',
            "{path}, line 1 has columns source, target, references; it needs source and either "
            "target or references",
        ),
        (GOOD + '{"source": "a", "target": " "}', "{path}, line 2 has an empty target"),
        ('{"source": "", "target": "a"}', "{path}, line 1 has an empty source"),
        ('{"source": "a", "references": ["b", ""]}', "{path}, line 1 has an empty reference"),
        (
            '{"source": "a", "references": []}',
            "{path}, line 1: references must be a list of at least one text",
        ),
        (
            '{"source": "a", "references": "b"}',
            "{path}, line 1: references must be a list of at least one text",
        ),
        (
            '{"source": "a", "target": [1]}',
            "{path}, line 1: the target must be a text, and is [1]",
        ),
        (
            '{"source": "\\ud800", "target": "a"}',
            "{path}, line 1: the source has half a character (a lone surrogate)",
        ),
        (GOOD.encode() + b"\xff", "{path} is not UTF-8 text: line 2 is the first that is not"),
    ],
)
def test_json_lines_that_cannot_be_used(tmp_path: Path, content: str | bytes, message: str) -> None:
    check_refused(data_file(tmp_path, content), message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "{path} has no rows"),
        ("source,target\n", "{path} has no rows"),
        ("input,target\na,b\n", "{path} has columns input, target; it needs source and target"),
        ("source,target\na,b\na,\n", "{path}, line 3 has an empty target"),
        ("source,target\na\n", "{path}, line 2 has 1 fields; the heading has 2"),
        ("source,target\na,b,c\n", "{path}, line 2 has 3 fields; the heading has 2"),
        ('source,target\n"a,b\n', "{path}, line 2 is not CSV: unexpected end of data"),
        ("source,target\na,b\n" + "a" * 200_000, "{path}, line 3 is not CSV: field larger than"),
    ],
)
def test_csv_that_cannot_be_used(tmp_path: Path, content: str, message: str) -> None:
    check_refused(data_file(tmp_path, content, "rows.csv"), message)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    check_refused(tmp_path / "none.jsonl", "there is no file {path}")
    check_refused(tmp_path, "{path} cannot be read: Is a directory")
    with pytest.raises(DataError, match="there is no file"):
        sha256_of(tmp_path / "none.jsonl")


def test_the_digest_is_of_the_bytes(tmp_path: Path) -> None:
    path = data_file(tmp_path, b"\xff\r\n")
    assert sha256_of(path) == hashlib.sha256(b"\xff\r\n").hexdigest()


@pytest.mark.parametrize(
    ("split", "joined"),
    [
        ("£ 20 , it 's kid - friendly .", "£20, it's kid-friendly."),
        ("Is it ? Yes ;  they 'll do", "Is it? Yes; they'll do"),
        ("It's £20, kid-friendly - and cheap.", "It's £20, kid-friendly-and cheap."),
        ("Nothing to join here.", "Nothing to join here."),
    ],
)
def test_detokenise(split: str, joined: str) -> None:
    assert detokenise(split) == joined


def check_refused(path: Path, message: str) -> None:
    with pytest.raises(DataError) as refusal:
        read_rows(path)
    assert isinstance(refusal.value, PrefixServeError)
    assert str(refusal.value).startswith(message.format(path=path))
    assert "\n" not in str(refusal.value)
