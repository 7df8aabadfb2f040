"""Keeps the prefixes of pinned tasks loaded, as the store says."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from prefix_store.ending import end
from prefix_store.errors import (
    PinsFullError,
    PrefixStoreError,
    StoreUnavailableError,
    UnknownTaskError,
)
from prefix_store.store import PrefixStore
from prefix_store.task import Task, TaskRecord
from server.residency import ResidentPrefixes

logger = logging.getLogger(__name__)

_RETRY_SECONDS = 5.0
_LOGGED_EVERY = 100


class Pins:
    """Follows which tasks are pinned, on whatever server that was asked for.

    A pinned task's versions are loaded as soon as they are known, and stay. Where they do not all
    fit, which needs servers with different budgets or two pins at the same moment, the first by
    name are kept, and the log tells of the others. Start it, and close it at the end.
    """

    def __init__(self, store: PrefixStore, prefixes: ResidentPrefixes) -> None:
        self._store = store
        self._prefixes = prefixes
        self._tasks: dict[str, Task] = {}  # those that are pinned
        self._changed: set[str] = set()
        self._any_changed = True
        self._told: set[str] = set()  # versions whose failure is in the log
        self._wake = asyncio.Event()
        self._following: asyncio.Task[None] | None = None

    def check(self, task: Task) -> None:
        """Refuse to pin a task that does not fit beside those that are pinned.

        Raises:
            PinsFullError
        """
        wanted = self._served((*self._tasks.values(), task))
        size, most = self._nbytes(wanted), self._prefixes.max_bytes
        if size > most:
            raise PinsFullError(
                f"task {task.name!r} needs {self._nbytes(self._served([task]))} bytes and does not "
                f"fit into the {most} for prefixes beside those that are pinned already; unpin "
                "another task, or raise --prefix-cache-bytes"
            )

    def changed(self, task_ids: tuple[str, ...] | None) -> None:
        """Look at these tasks again; None is at all."""
        if task_ids is None:
            self._any_changed = True
        else:
            self._changed.update(task_ids)
        self._wake.set()

    async def start(self) -> None:
        """Load every pinned task, then go on following."""
        synced = await self._sync()
        self._following = asyncio.create_task(self._follow(synced))

    async def close(self) -> None:
        """Stop following; what is pinned stays so."""
        if self._following is not None:
            await end(self._following)

    async def _follow(self, synced: bool) -> None:
        while True:
            try:
                async with asyncio.timeout(None if synced else _RETRY_SECONDS):
                    await self._wake.wait()
            except TimeoutError:
                pass
            try:
                synced = await self._sync()
            except Exception:
                logger.exception("pinning failed; trying again")
                synced = False

    async def _sync(self) -> bool:
        """Pin and unpin what the store says; False where that has to be tried again."""
        self._wake.clear()
        try:
            await self._look()
        except StoreUnavailableError:
            return False
        wanted = self._served(self._tasks.values())
        self._told &= wanted.keys()
        for version in self._prefixes.pinned - wanted.keys():
            self._prefixes.unpin(version)
        return await self._pin([wanted[v] for v in wanted if v not in self._prefixes.pinned])

    async def _look(self) -> None:
        """Bring `_tasks` up to date; what is not looked at yet stays noted when that fails."""
        if self._any_changed:
            self._changed.clear()
            self._any_changed = False
            try:
                tasks = await self._store.pinned()
            except BaseException:
                self._any_changed = True
                raise
            self._tasks = {task.task_id: task for task in tasks}
        while self._changed:
            task_id = self._changed.pop()
            try:
                task = await self._store.get(task_id)
            except UnknownTaskError:
                self._tasks.pop(task_id, None)
            except BaseException:
                self._changed.add(task_id)
                raise
            else:
                self._tasks.pop(task_id, None)
                if task.pinned:
                    self._tasks[task_id] = task

    async def _pin(self, records: list[TaskRecord]) -> bool:
        done = True
        for number, record in enumerate(records, 1):
            try:
                await self._prefixes.pin(record)
            except PrefixStoreError as error:
                done = False
                if record.version not in self._told:
                    logger.warning("task %s is not pinned here: %s", record.task_id, error)
                    self._told.add(record.version)
            else:
                self._told.discard(record.version)
            if number % _LOGGED_EVERY == 0 or number == len(records):
                logger.info("loaded %d of %d pinned prefixes", number, len(records))
        return done

    def _served(self, tasks: Iterable[Task]) -> dict[str, TaskRecord]:
        """By version, in the order of the tasks' names."""
        ordered = sorted(tasks, key=lambda task: task.task_id)
        return {record.version: record for task in ordered for record in task.served}

    def _nbytes(self, records: dict[str, TaskRecord]) -> int:
        return sum(self._prefixes.nbytes(record) for record in records.values())
