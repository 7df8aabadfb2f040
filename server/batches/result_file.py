"""A file of results that is only ever appended to, so that a restart goes on where it ended."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from pydantic import BaseModel

SYNC_LINES = 32
"""Lines after which the file is brought to the disk."""


class _Line(BaseModel):
    id: str


class ResultFile:
    """One file, to be closed. A part of a line at its end, of a server that died, is cut off.

    Attributes:
        done: numbers of the batch's lines that are in it.
    """

    def __init__(self, path: Path) -> None:
        """
        Raises:
            OSError, ValueError: it cannot be opened, or is damaged.
        """
        self.done: set[int] = set()
        self._path = path
        self._unsynced = 0
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            self._size = self._read()
            os.ftruncate(self._file, self._size)
        except BaseException:
            os.close(self._file)
            raise

    def close(self) -> None:
        """Bring what was appended to the disk.

        Raises:
            OSError: that fails.
        """
        try:
            os.fsync(self._file)
        finally:
            os.close(self._file)

    async def append(self, number: int, line: str) -> None:
        """Add the result of one of the batch's lines."""
        # Without an await, so that lines never mix and a cancelled task leaves a whole one.
        self._write(line.encode() + b"\n")
        self.done.add(number)
        self._unsynced += 1
        if self._unsynced >= SYNC_LINES:
            self._unsynced = 0
            await asyncio.to_thread(_sync, self._path)

    def _write(self, line: bytes) -> None:
        written = 0
        try:
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError:
            os.ftruncate(self._file, self._size)
            raise
        self._size += written

    def _read(self) -> int:
        """Note the whole lines; where they end, in bytes."""
        end = 0
        with self._path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self.done.add(number_of(_Line.model_validate_json(line).id))
                end += len(line)
        return end


def _sync(path: Path) -> None:
    """By a descriptor of its own: who waits may be gone, and the file closed, before the end."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def result_id(batch_id: str, number: int) -> str:
    """Names the result of a batch's line."""
    return f"batch_req_{batch_id.removeprefix('batch-')}_{number}"


def number_of(result: str) -> int:
    """The line that a result is of."""
    return int(result.rpartition("_")[2])
