"""Who changed what: a line of JSON for each administrative request, in a file of its own."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from server.errors import StartupError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One administrative request, carried out or refused.

    Attributes:
        time: when it was answered, ISO 8601 in UTC.
        tenant, key_id: who asked; None where that is not known.
        action: the method and the route.
        task: the task that it is about.
        target: what else it is about: a key, a tenant.
        version: the version that the task has now, or that the path names.
        status: the answer's HTTP status; 499 when the client went before it.
        outcome: `done`, `refused` (4xx) or `failed` (5xx).
    """

    time: str
    request_id: str
    tenant: str | None
    key_id: str | None
    action: str
    task: str | None
    target: dict[str, str]
    version: str | None
    status: int
    outcome: str


class AuditLog:
    """Appends to a file that only its owner may read. An async context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path.expanduser()
        self._writing = asyncio.Lock()
        self._file = -1

    async def __aenter__(self) -> Self:
        """Open the file.

        Raises:
            StartupError: it cannot be written.
        """
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = os.open(self._path, flags, 0o600)
        except OSError as error:
            raise StartupError(
                f"the audit log {self._path} cannot be written: {error.strerror or error}; choose "
                "another file with --audit-log"
            ) from error
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        async with self._writing:
            os.close(self._file)

    async def write(self, entry: AuditEntry) -> None:
        """Append a line, and return when it is on the disk; where that fails the log says so."""
        line = json.dumps(asdict(entry)) + "\n"
        async with self._writing:
            try:
                await asyncio.to_thread(self._append, line.encode())
            except OSError:
                logger.exception("the audit log cannot be written; lost: %s", line.rstrip())

    def _append(self, line: bytes) -> None:
        os.write(self._file, line)  # at once: other processes may append to the file
        os.fsync(self._file)
