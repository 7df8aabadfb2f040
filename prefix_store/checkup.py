"""Check a whole store against its own hashes and against the base model it is for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

from prefix_store.artefact import Artefact
from prefix_store.base_model import BaseModelSpec
from prefix_store.errors import (
    CorruptArtefactError,
    IncompatiblePrefixError,
    InvalidPrefixError,
    UnknownTaskError,
    UnknownVersionError,
)
from prefix_store.prefix import Prefix
from prefix_store.store import Audit, PrefixStore
from prefix_store.task import Task, TaskRecord
from prefix_store.validate import check_fits

_RESTORE = "upload it again, or import the task from an export"
_REBUILD = "export the store and import it into an empty one"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong.

    Attributes:
        task_id: the task it is about, or empty.
        version: the version, blob or API key it is about, or empty.
        problem, remedy: what is wrong, and what to do about it.
    """

    task_id: str
    version: str
    problem: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Checkup:
    """Every task that was checked, and everything that is wrong; in order when nothing is."""

    tasks: tuple[Task, ...]
    findings: tuple[Finding, ...]


async def check_store(
    store: PrefixStore, spec: BaseModelSpec, progress: Callable[[int, int], None]
) -> Checkup:
    """Check every task: its bytes, their hash, their shape, the base model they were made for.

    One artefact at a time is in memory. What changes meanwhile is not called wrong.

    Args:
        progress: called with how many tasks are checked, of how many.

    Raises:
        StoreUnavailableError
    """
    audit = await store.audit()
    findings = list(_of_books(audit))
    known: dict[str, TaskRecord | _Trouble] = {}
    for count, task in enumerate(audit.tasks, 1):
        for record in task.versions:
            if record.version not in known:
                known[record.version] = await _examined(store, spec, record.version)
            trouble = _compared(record, known[record.version])
            if trouble is not None and await _keeps(store, record):
                findings.append(
                    Finding(task.task_id, record.version, trouble.problem, trouble.remedy)
                )
        progress(count, len(audit.tasks))
    return Checkup(audit.tasks, tuple(sorted(findings, key=lambda finding: finding.task_id)))


@dataclass(frozen=True, slots=True)
class _Trouble:
    problem: str
    remedy: str


async def _examined(store: PrefixStore, spec: BaseModelSpec, version: str) -> TaskRecord | _Trouble:
    """What the artefact says of itself, as a task's record, or what is wrong with it."""
    try:
        data = await store.read(version)
    except UnknownVersionError:
        return _Trouble("its bytes are not in the store", _RESTORE)
    except CorruptArtefactError as error:
        return _Trouble(str(error), _RESTORE)
    try:
        prefix = await asyncio.to_thread(Prefix.from_bytes, data)
        check_fits(prefix, spec, spec.max_positions)
    except IncompatiblePrefixError as error:
        return _Trouble(str(error), "train it on this base model, or serve the one it is for")
    except InvalidPrefixError as error:
        return _Trouble(f"it is not a prefix: {error}", "upload a good one and delete this version")
    return Artefact(prefix, data, version).record("", 0)


def _compared(record: TaskRecord, found: TaskRecord | _Trouble) -> _Trouble | None:
    if isinstance(found, _Trouble):
        return found
    expected = replace(found, task_id=record.task_id, created_at=record.created_at)
    differ = [
        field.name
        for field in fields(record)
        if getattr(record, field.name) != getattr(expected, field.name)
    ]
    if not differ:
        return None
    return _Trouble(f"the task's {', '.join(differ)} on record differ from the artefact", _RESTORE)


async def _keeps(store: PrefixStore, record: TaskRecord) -> bool:
    """Whether the task keeps the version still."""
    try:
        task = await store.get(record.task_id)
    except UnknownTaskError:
        return False
    return any(kept.version == record.version for kept in task.versions)


def _of_books(audit: Audit) -> Iterator[Finding]:
    for task_id in audit.unreadable:
        yield Finding(
            task_id,
            "",
            "the stored task cannot be read",
            f"delete its field of the hash {{prefixserve}}:tasks, then {_RESTORE}",
        )
    for task_id in audit.mislisted:
        yield Finding(
            task_id,
            "",
            "the list of shared tasks differs from the task",
            "say again with whom it is shared; if there is no such task, delete its field of the "
            "hash {prefixserve}:shared",
        )
    for task_id in audit.missized:
        yield Finding(
            task_id,
            "",
            "its size on record, for its tenant's quota, is wrong",
            "activate its version again; if there is no such task, delete its field of the hash "
            "{prefixserve}:stored:<tenant>",
        )
    for key_id in audit.unreadable_keys:
        yield Finding(
            "",
            key_id,
            "the stored API key cannot be read",
            "delete its field of the hash {prefixserve}:keys and make another key",
        )
    for name in audit.unreferenced:
        yield Finding("", name, "its bytes are stored and no task keeps it", _REBUILD)
    for version in audit.miscounted:
        yield Finding("", version, "the number of tasks that keep it is wrong", _REBUILD)
