"""Reads a file of requests, a line each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def numbered_lines(path: Path, max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """The lines that are not blank, numbered from 0; None for one of more than `max_bytes`.

    Raises:
        OSError: the file cannot be read.
    """
    number = 0
    with path.open("rb") as file:
        while line := file.readline(max_bytes + 1):
            is_long = len(line) > max_bytes and not line.endswith(b"\n")
            if is_long:
                while (rest := file.readline(max_bytes)) and not rest.endswith(b"\n"):
                    pass
            elif not line.strip():
                continue
            yield number, None if is_long else line
            number += 1
