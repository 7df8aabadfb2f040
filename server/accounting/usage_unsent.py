"""Usage that could not be sent before the server stopped, in files of its data directory."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from datetime import date
from pathlib import Path

from server.accounting.usage_types import Batch, Entry, Quantity

logger = logging.getLogger(__name__)

_PATTERN = "usage-unsent-*.json"


class UnsentFiles:
    """A file for each batch; it appears whole."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, batches: Iterable[Batch]) -> None:
        """Keep batches."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for batch in batches:
            counts = [
                [entry.day.isoformat(), entry.tenant, entry.task_id, entry.quantity, count]
                for entry, count in batch.counts.items()
            ]
            stored = {"sender": batch.sender, "number": batch.number, "counts": counts}
            path = self._path(batch)
            partial = path.with_suffix(".partial")
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                json.dump(stored, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)

    def read(self) -> list[Batch]:
        """What is kept, each sender's batches in order."""
        found = filter(None, map(_read, self._folder.glob(_PATTERN)))
        return sorted(found, key=lambda batch: (batch.sender, batch.number))

    def remove(self, batch: Batch) -> None:
        """Forget a batch that was sent."""
        self._path(batch).unlink(missing_ok=True)

    def _path(self, batch: Batch) -> Path:
        return self._folder / _PATTERN.replace("*", f"{batch.sender}-{batch.number}")


def _read(path: Path) -> Batch | None:
    try:
        stored = json.loads(path.read_bytes())
        counts = {
            Entry(date.fromisoformat(day), tenant, task_id, Quantity(quantity)): count
            for day, tenant, task_id, quantity, count in stored["counts"]
        }
        return Batch(stored["sender"], stored["number"], counts)
    except (OSError, ValueError, KeyError, TypeError):
        logger.exception("%s cannot be read; the usage in it is not counted", path)
        return None
