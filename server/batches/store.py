"""Files and batches in a folder. Names come from `new_id`, and never from a client.

Each is a record, `NAME.json`, replaced as a whole; a file has its bytes beside it in `NAME.jsonl`.
The records are few and are kept in memory, too.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from prefix_store.errors import QuotaExceededError
from server.batches.errors import TooManyBatchesError, UnknownBatchError
from server.batches.records import BatchRecord, FileRecord, is_id, new_id, now
from server.errors import StartupError

MAX_BATCHES = 1000
"""Batches that are remembered of a tenant; the oldest that has ended makes room."""

_FILE_OVERHEAD = 4096
"""What a file counts for beside its bytes, so that empty ones are bounded too."""


class BatchStore:
    """What the tenants have here."""

    def __init__(self, folder: Path, *, tenant_bytes: int) -> None:
        """
        Args:
            folder: made when it is not there.
            tenant_bytes: most that the files of a tenant may have together.

        Raises:
            StartupError: it cannot be read or written.
        """
        self._folder = folder.expanduser()
        self._tenant_bytes = tenant_bytes
        self._adding = threading.Lock()
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            records = {path: path.read_bytes() for path in self._folder.glob("*.json")}
            self._files = {
                path.stem: FileRecord.model_validate_json(data)
                for path, data in records.items()
                if path.stem.startswith("file-")
            }
            self._batches = {
                path.stem: BatchRecord.model_validate_json(data)
                for path, data in records.items()
                if path.stem.startswith("batch-")
            }
            self._remove_leftovers()
        except (OSError, ValueError) as error:
            raise StartupError(
                f"the batches in {self._folder} cannot be read: {error}; move that folder away"
            ) from error

    def path(self, file_id: str) -> Path:
        """Where the bytes of a file are."""
        assert is_id(file_id)  # noqa: S101 - those of clients are looked up before
        return self._folder / f"{file_id}.jsonl"

    def file(self, tenant: str, file_id: str) -> FileRecord:
        """One of the tenant's files.

        Raises:
            UnknownBatchError: it has none of this name.
        """
        found = self._files.get(file_id)
        if found is None or found.tenant != tenant:
            raise UnknownBatchError(f"no file {file_id[:80]!r}: upload it, or check the id")
        return found

    def files(self, tenant: str) -> list[FileRecord]:
        """The tenant's files, the last one first."""
        own = [file for file in list(self._files.values()) if file.tenant == tenant]
        return sorted(own, key=lambda file: (file.created_at, file.id), reverse=True)

    def batch(self, tenant: str, batch_id: str) -> BatchRecord:
        """One of the tenant's batches.

        Raises:
            UnknownBatchError: it has none of this name.
        """
        found = self._batches.get(batch_id)
        if found is None or found.tenant != tenant:
            raise UnknownBatchError(f"no batch {batch_id[:80]!r}: create it, or check the id")
        return found

    def batches(self, tenant: str) -> list[BatchRecord]:
        """The tenant's batches, the last one first."""
        own = [batch for batch in self._batches.values() if batch.tenant == tenant]
        return sorted(own, key=lambda batch: (batch.created_at, batch.id), reverse=True)

    def unfinished(self) -> list[BatchRecord]:
        """Every tenant's batches that have not ended, the first one first."""
        found = [batch for batch in self._batches.values() if not batch.status.is_final]
        return sorted(found, key=lambda batch: batch.created_at)

    def add_file(self, tenant: str, filename: str, purpose: str, source: BinaryIO) -> FileRecord:
        """Keep what `source` holds. It may run on a thread.

        Raises:
            QuotaExceededError: the tenant has too much already.
        """
        source.seek(0, os.SEEK_END)
        size = source.tell()
        source.seek(0)
        with self._adding:
            kept = sum(file.bytes + _FILE_OVERHEAD for file in self.files(tenant))
            if kept + size + _FILE_OVERHEAD > self._tenant_bytes:
                raise QuotaExceededError(
                    f"the tenant's files have {kept} bytes and this one {size}; expected at most "
                    f"{self._tenant_bytes} together, which --max-batch-tenant-bytes sets; delete "
                    "some"
                )
            file_id = new_id("file")
            with self._created(self.path(file_id)) as target:
                shutil.copyfileobj(source, target)
                _sync(target)
            return self._put_file(file_id, tenant, filename, purpose)

    def publish(self, file_id: str, tenant: str, filename: str) -> bool:
        """Give the tenant a file of results; False where there is nothing in it."""
        path = self.path(file_id)
        if not path.exists() or path.stat().st_size == 0:
            path.unlink(missing_ok=True)
            return False
        self._put_file(file_id, tenant, filename, "batch_output")
        return True

    def delete_file(self, tenant: str, file_id: str) -> None:
        """Forget a file.

        Raises:
            UnknownBatchError: the tenant has none of this name.
        """
        self.file(tenant, file_id)
        del self._files[file_id]
        self._record(file_id).unlink(missing_ok=True)
        self.path(file_id).unlink(missing_ok=True)

    def make_room(self, tenant: str) -> None:
        """Forget the tenant's oldest batch that has ended, if it has as many as it may.

        Raises:
            TooManyBatchesError: none of them has ended.
        """
        own = self.batches(tenant)
        if len(own) < MAX_BATCHES:
            return
        ended = [batch for batch in own if batch.status.is_final]
        if not ended:
            raise TooManyBatchesError(
                f"{len(own)} batches have not ended; expected fewer. Wait for some, or cancel them"
            )
        del self._batches[ended[-1].id]
        self._record(ended[-1].id).unlink(missing_ok=True)

    def save(self, batch: BatchRecord) -> BatchRecord:
        """Remember a batch as it is now."""
        self._write(batch.id, batch)
        self._batches[batch.id] = batch
        return batch

    def _put_file(self, file_id: str, tenant: str, filename: str, purpose: str) -> FileRecord:
        record = FileRecord(
            id=file_id,
            tenant=tenant,
            filename=filename,
            purpose=purpose,
            bytes=self.path(file_id).stat().st_size,
            created_at=now(),
        )
        self._write(file_id, record)
        self._files[file_id] = record
        return record

    def _record(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _write(self, name: str, record: FileRecord | BatchRecord) -> None:
        part = self._folder / f"{name}.part"
        with self._created(part) as file:
            file.write(record.model_dump_json().encode())
            _sync(file)
        part.replace(self._record(name))

    def _created(self, path: Path) -> BinaryIO:
        return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")

    def _remove_leftovers(self) -> None:
        """What a server that was killed left half done."""
        wanted = set(self._files) | set(self._results())
        for path in self._folder.glob("*.part"):
            path.unlink()
        for path in self._folder.glob("*.jsonl"):
            if path.stem not in wanted:
                path.unlink()

    def _results(self) -> Iterator[str]:
        for batch in self.unfinished():
            yield batch.output_id
            yield batch.error_id


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
