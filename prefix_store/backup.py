"""A whole store to a folder and back; what is there already is left as it is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from functools import partial
from pathlib import Path

from prefix_store.api_key import ApiKey
from prefix_store.archive import (
    Index,
    Outcome,
    has_artefact,
    make_folder,
    read_artefact,
    read_index,
    saved_task,
    write_index,
    written_artefact,
)
from prefix_store.archived_keys import restored_keys
from prefix_store.condition import ANY, Condition
from prefix_store.errors import (
    ArchiveError,
    CorruptArtefactError,
    PrefixStoreError,
    StoreUnavailableError,
    UnknownTaskError,
    UnknownVersionError,
)
from prefix_store.store import PrefixStore
from prefix_store.task import Task
from prefix_store.task_id import check_stored_name

Progress = Callable[[int, int], None]
"""Called with how much is done and how much there is."""


async def export_store(store: PrefixStore, folder: Path, progress: Progress) -> Outcome:
    """Write every task to `folder`, made if missing. Files that are whole are not written again.

    A task that cannot be read whole is left out; a change made meanwhile is in the export or not.

    Args:
        progress: counts bytes.

    Raises:
        ArchiveError: the folder cannot be written.
        StoreUnavailableError: what was written stays, for the next time.
    """
    await asyncio.to_thread(make_folder, folder)
    tasks = await store.list()
    sizes = {record.version: record.nbytes for task in tasks for record in task.versions}
    export = _Export(store, folder, progress, sum(sizes.values()))
    saved: list[Task] = []
    written: list[str] = []
    failed: dict[str, str] = {}
    for task in tasks:
        before = export.files
        try:
            now = await export.save(task)
        except CorruptArtefactError as error:
            failed[task.task_id] = str(error)
        except UnknownTaskError:
            continue  # deleted meanwhile
        else:
            saved.append(now)
            if export.files > before:
                written.append(task.task_id)
    keys = await store.keys.list()
    await asyncio.to_thread(write_index, folder, saved, keys)
    unchanged = {task.task_id for task in saved} - set(written)
    return Outcome(tuple(written), tuple(sorted(unchanged)), failed, len(keys))


class _Export:
    """An export under way; `files` counts those written."""

    def __init__(self, store: PrefixStore, folder: Path, progress: Progress, total: int) -> None:
        self._store = store
        self._folder = folder
        self._progress = progress
        self._total = total
        self._bytes = 0
        self._present: set[str] = set()
        self.files = 0

    async def save(self, task: Task) -> Task:
        """Write the artefacts of a task, or of what it has become; the latter.

        Raises:
            CorruptArtefactError: bytes are missing or wrong.
            UnknownTaskError: it was deleted.
        """
        while True:
            try:
                for record in task.versions:
                    await self._save(record.version)
            except UnknownVersionError as error:
                newer = await self._store.get(task.task_id)
                if newer == task:
                    raise CorruptArtefactError(
                        "its bytes are not in the store; upload the prefix again"
                    ) from error
                task = newer
            else:
                return task

    async def _save(self, version: str) -> None:
        if version in self._present:
            return
        size = await self._store.size(version)
        if await asyncio.to_thread(has_artefact, self._folder, version):
            self._count(size)
        else:
            with written_artefact(self._folder, version) as file:
                async with aclosing(self._store.stream(version, 0, size)) as pieces:
                    async for piece in pieces:
                        await asyncio.to_thread(file.write, piece)
                        self._count(len(piece))
            self.files += 1
        self._present.add(version)

    def _count(self, nbytes: int) -> None:
        self._bytes += nbytes
        self._total = max(self._total, self._bytes)
        self._progress(self._bytes, self._total)


async def import_store(
    store: PrefixStore, folder: Path, progress: Progress, *, overwrite: bool = False
) -> Outcome:
    """Put every task of an export into the store, each whole in one step or not at all.

    A task that is there already, with whole bytes, is left alone. So is a task of the same name
    that is different, unless `overwrite`. API keys come first; one that is there, good or revoked,
    is always left alone, so that an old export gives nobody back what was taken from them.

    Args:
        progress: counts tasks.

    Raises:
        ArchiveError: the folder is not an export.
        StoreUnavailableError: the tasks imported so far stay.
    """
    index = await asyncio.to_thread(read_index, folder)
    keys = await _import_keys(store, index)
    done: list[str] = []
    unchanged: list[str] = []
    failed: dict[str, str] = {}
    for count, (task_id, entry) in enumerate(index.tasks.items(), 1):
        try:
            changed = await _import_task(store, folder, task_id, entry, overwrite)
            (done if changed else unchanged).append(task_id)
        except StoreUnavailableError:
            raise
        except PrefixStoreError as error:
            failed[task_id] = str(error)
        progress(count, len(index.tasks))
    return Outcome(tuple(done), tuple(unchanged), failed, keys)


async def _import_keys(store: PrefixStore, index: Index) -> int:
    """How many were missing."""
    known = {key.key_id for key in await store.keys.list()}
    missing = [key for key in restored_keys(index.keys) if key.key_id not in known]
    for key in missing:
        await store.keys.change(key.key_id, partial(_there_or, key))
    return len(missing)


def _there_or(key: ApiKey, found: ApiKey | None) -> ApiKey:
    return found or key


async def _import_task(
    store: PrefixStore, folder: Path, task_id: str, entry: object, overwrite: bool
) -> bool:
    """Whether anything had to be done."""
    check_stored_name(task_id)
    saved = saved_task(entry)
    artefacts = [
        await asyncio.to_thread(read_artefact, folder, kept.version) for kept in saved.versions
    ]
    task = saved.task(task_id, artefacts)
    try:
        found = await store.get(task_id)
    except UnknownTaskError:
        await store.restore(task, artefacts, Condition(none_match=frozenset({ANY})))
        return True
    if found == task and await _is_whole(store, task):
        return False
    if found != task and not overwrite:
        raise ArchiveError("the store has a different task of this name; --overwrite replaces it")
    await store.restore(task, artefacts, Condition(match=frozenset({found.version})))
    return True


async def _is_whole(store: PrefixStore, task: Task) -> bool:
    """Whether every version of the task is in the store with the right bytes."""
    try:
        for record in task.versions:
            size = await store.size(record.version)
            async with aclosing(store.stream(record.version, 0, size)) as pieces:
                async for _ in pieces:
                    pass
    except (UnknownVersionError, CorruptArtefactError):
        return False
    return True
