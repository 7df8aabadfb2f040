"""A folder with a whole store: one safetensors file for each version, and `tasks.json`.

sha256-<hex digest>.safetensors  the artefact's bytes, which hash to its name
tasks.json                       the tasks, and hashes of the API keys; written last, so what it
                                 names is there
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from mmap import ACCESS_COPY, mmap
from pathlib import Path
from typing import IO, Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from prefix_store.api_key import ApiKey
from prefix_store.archived_keys import saved_keys
from prefix_store.artefact import Artefact
from prefix_store.errors import ArchiveError, InvalidPrefixError
from prefix_store.prefix import Prefix
from prefix_store.strict_json import parse_object
from prefix_store.task import Task, divided, shared

INDEX = "tasks.json"
FORMAT = "prefixserve-export/1"
MAX_INDEX_BYTES = 256 * 1024 * 1024
_VERSION = re.compile(r"sha256:([0-9a-f]{64})")
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@checked_dataclass(frozen=True, config=_STRICT)
class _SavedVersion:
    version: str
    created_at: float


@checked_dataclass(frozen=True, config=_STRICT)
class SavedTask:
    """A task as `tasks.json` has it; what its artefacts say themselves is left out."""

    version: str
    versions: tuple[_SavedVersion, ...]
    history: tuple[str, ...]
    split: dict[str, int]
    pinned: bool
    shared_with: tuple[str, ...] = ()

    @classmethod
    def of(cls, task: Task) -> SavedTask:
        """The task to be saved."""
        return cls(
            version=task.version,
            versions=tuple(
                _SavedVersion(record.version, record.created_at) for record in task.versions
            ),
            history=task.history,
            split={share.version: share.percent for share in task.split},
            pinned=task.pinned,
            shared_with=task.shared_with,
        )

    def task(self, task_id: str, artefacts: Sequence[Artefact]) -> Task:
        """The task again.

        Args:
            artefacts: of `versions`, in order.

        Raises:
            UnknownVersionError, InvalidSplitError: it splits among others, or badly.
            InvalidTenantError: it is shared with what is no tenant.
        """
        records = tuple(
            artefact.record(task_id, saved.created_at)
            for saved, artefact in zip(self.versions, artefacts, strict=True)
        )
        whole = Task(task_id, self.version, records, self.history, pinned=self.pinned)
        return shared(divided(whole, self.split), self.shared_with)

    def check(self) -> None:
        """Refuse versions that contradict one another.

        Raises:
            ArchiveError
        """
        kept = [saved.version for saved in self.versions]
        for version in kept:
            if not _VERSION.fullmatch(version):
                raise ArchiveError(
                    f"{INDEX} names a version {version[:80]!r}; expected sha256: and 64 hex digits"
                )
        known = set(kept)
        for name, versions in (
            ("versions", kept),
            ("history", list(self.history)),
            ("version and history", [self.version, *self.history]),
        ):
            if len(set(versions)) < len(versions) or not known.issuperset(versions):
                raise ArchiveError(
                    f"{name} in {INDEX} must be versions that the task keeps, each once"
                )


_SAVED_TASK = TypeAdapter(SavedTask)


def saved_task(entry: object) -> SavedTask:
    """A task's entry in `tasks.json`, checked.

    Raises:
        ArchiveError: it is not as `SavedTask` says.
    """
    try:
        saved = _SAVED_TASK.validate_json(json.dumps(entry))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ArchiveError(f"its entry in {INDEX} is wrong at {place!r}: {first['msg']}") from error
    saved.check()
    return saved


def make_folder(folder: Path) -> None:
    """Make the folder, if it is missing.

    Raises:
        ArchiveError
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArchiveError(f"cannot make the folder {folder}: {error.strerror}") from error


@dataclass(frozen=True, slots=True)
class Index:
    """What `tasks.json` has: each task's entry and each API key's, as it is there."""

    tasks: Mapping[str, object]
    keys: Mapping[str, object]


def read_index(folder: Path) -> Index:
    """What is in `tasks.json`.

    Raises:
        ArchiveError: there is no such file, or it is not of this format.
    """
    path = folder / INDEX
    with _readable(path):
        size = path.stat().st_size
        if size > MAX_INDEX_BYTES:
            raise ArchiveError(f"{path} has {size} bytes; at most {MAX_INDEX_BYTES} are accepted")
        text = path.read_bytes()
    try:
        index = parse_object(str(path), text)
    except InvalidPrefixError as error:
        raise ArchiveError(str(error)) from error
    tasks, keys = index.get("tasks"), index.get("keys", {})
    if index.get("format") != FORMAT or not isinstance(tasks, dict) or not isinstance(keys, dict):
        raise ArchiveError(f"{path} does not have format {FORMAT!r} with tasks; is it an export?")
    return Index(tasks, keys)


def write_index(folder: Path, tasks: Sequence[Task], keys: Sequence[ApiKey]) -> None:
    """Write `tasks.json`, whole or not at all.

    Raises:
        ArchiveError: it cannot be written.
    """
    saved = {task.task_id: _SAVED_TASK.dump_python(SavedTask.of(task)) for task in tasks}
    index = {"format": FORMAT, "tasks": saved, "keys": saved_keys(keys)}
    text = json.dumps(index, indent=1)
    with _written(folder / INDEX) as file:
        file.write(text.encode())


def artefact_path(folder: Path, version: str) -> Path:
    """Where a version is kept; the version must be well formed."""
    return folder / f"{version.replace(':', '-')}.safetensors"


def has_artefact(folder: Path, version: str) -> bool:
    """Whether the version's file is there and hashes to its name.

    Raises:
        ArchiveError: it is there and cannot be read.
    """
    path = artefact_path(folder, version)
    if not path.exists():
        return False
    with _readable(path), path.open("rb") as file:
        return _hash_of(file) == version


def read_artefact(folder: Path, version: str) -> Artefact:
    """A version's artefact, mapped from its file rather than read.

    Raises:
        ArchiveError: the file is missing, or does not hash to its name.
        InvalidPrefixError: it is not a valid prefix.
    """
    path = artefact_path(folder, version)
    with _readable(path), path.open("rb") as file:
        found = _hash_of(file)
        if found != version:
            raise ArchiveError(
                f"{path} hashes to {found}: it is damaged; export again, or copy it again"
            )
        data = mmap(file.fileno(), 0, access=ACCESS_COPY)
    return Artefact(Prefix.from_bytes(data), data, version)


@contextmanager
def written_artefact(folder: Path, version: str) -> Iterator[IO[bytes]]:
    """A file to write the version to, there once the block ended without an error.

    Raises:
        ArchiveError: it cannot be written.
    """
    with _written(artefact_path(folder, version)) as file:
        yield file


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of each task.

    Attributes:
        done: names of tasks that were written.
        unchanged: names of tasks that were there already, whole.
        failed: names of tasks that were left out, and why.
        keys: number of API keys that were written.
    """

    done: tuple[str, ...]
    unchanged: tuple[str, ...]
    failed: Mapping[str, str]
    keys: int


def _hash_of(file: Any) -> str:
    return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArchiveError(f"cannot read {path}: {error.strerror or error}") from error


@contextmanager
def _written(path: Path) -> Iterator[IO[bytes]]:
    """A file under another name, on the disk before it gets its own."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise ArchiveError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
