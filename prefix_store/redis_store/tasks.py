"""Tasks in Redis: read, compared and changed."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import cast

from redis.asyncio import Redis

from prefix_store.errors import UnknownTaskError
from prefix_store.quota import NO_QUOTA, Quota
from prefix_store.redis_store import layout
from prefix_store.redis_store.commits import Commits, Kind
from prefix_store.redis_store.layout import (
    Blob,
    sharing_from_json,
    sharing_to_json,
    task_from_json,
    task_to_json,
)
from prefix_store.task import Task
from prefix_store.task_id import owner_and_name

_SCANNED = 500


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A task as it was read; None where there is none."""

    task_id: str
    text: bytes
    task: Task | None


# A task that changes meanwhile gets its size by that.
_MEASURE = """
if redis.call('HGET', KEYS[1], ARGV[1]) == ARGV[2] then
  redis.call('HSETNX', KEYS[2], ARGV[1], ARGV[3])
end
"""


class Tasks:
    """The tasks of a store. Errors of the client pass through."""

    def __init__(self, client: Redis, commits: Commits) -> None:
        self._client = client
        self._commits = commits
        self._measure = client.register_script(_MEASURE)

    async def snapshot(self, task_id: str) -> Snapshot:
        """The task now."""
        text = await cast("asyncio.Future[bytes | None]", self._client.hget(layout.TASKS, task_id))
        if text is None:
            return Snapshot(task_id, b"", None)
        return Snapshot(task_id, text, task_from_json(task_id, text))

    async def get(self, task_id: str) -> Task:
        """See `PrefixStore.get`."""
        return existing(await self.snapshot(task_id))

    async def pinned(self) -> list[Task]:
        """See `PrefixStore.pinned`."""
        return await self._chosen(lambda task: task.pinned)

    async def _chosen(self, wanted: Callable[[Task], bool]) -> list[Task]:
        found: dict[str, Task] = {}
        # A scan may tell a task twice, but leaves out none that is there all the time.
        async for name, text in self._client.hscan_iter(layout.TASKS, count=_SCANNED):
            task = task_from_json(name.decode(), text)
            if wanted(task):
                found[task.task_id] = task
        return [found[task_id] for task_id in sorted(found)]

    async def page(self, tenant: str, limit: int, after: str) -> list[Task]:
        """See `PrefixStore.page`."""
        sizes = self._client.hscan_iter(layout.stored(tenant), count=_SCANNED)
        names = {name.decode() async for name, _ in sizes}
        chosen = heapq.nsmallest(limit, (name for name in names if name > after))
        if not chosen:
            return []
        found = self._client.hmget(layout.TASKS, chosen)
        texts = await cast("asyncio.Future[list[bytes | None]]", found)
        return [
            task_from_json(name, text)
            for name, text in zip(chosen, texts, strict=True)
            if text is not None  # removed meanwhile
        ]

    async def count(self, tenant: str | None) -> int:
        """See `PrefixStore.count`."""
        name = layout.TASKS if tenant is None else layout.stored(tenant)
        return await cast("asyncio.Future[int]", self._client.hlen(name))

    async def list(self, tenant: str | None = None) -> list[Task]:
        """See `PrefixStore.list`."""
        return await self._chosen(lambda task: tenant in (None, owner_and_name(task.task_id)[0]))

    async def shared(self) -> dict[str, frozenset[str]]:
        """See `PrefixStore.shared`."""
        found = await cast(
            "asyncio.Future[dict[bytes, bytes]]", self._client.hgetall(layout.SHARED)
        )
        return {name.decode(): sharing_from_json(text) for name, text in found.items()}

    async def measure(self) -> None:
        """Write down the sizes of tasks, in a store that is older than quotas."""
        if await self._client.exists(layout.STORED):
            return
        async for name, text in self._client.hscan_iter(layout.TASKS, count=_SCANNED):
            task_id = name.decode()
            with suppress(ValueError, KeyError, TypeError):  # a damaged one; `audit` tells of it
                size = task_from_json(task_id, text).nbytes
                keys = [layout.TASKS, layout.stored(owner_and_name(task_id)[0])]
                await self._measure(keys=keys, args=[name, text, size])
        await self._client.set(layout.STORED, 1)

    async def check_quota(self, task: Task, quota: Quota) -> None:
        """Refuse a task that would be refused when it is changed to this.

        Raises:
            QuotaExceededError
        """
        if quota != NO_QUOTA:
            owner = owner_and_name(task.task_id)[0]
            found = self._client.hgetall(layout.stored(owner))
            sizes = await cast("asyncio.Future[dict[bytes, bytes]]", found)
            stored = {name.decode(): int(size) for name, size in sizes.items()}
            quota.check(owner, task.task_id, task.nbytes, stored)

    async def change(
        self,
        task_id: str,
        step: Callable[[Task | None], Task | None],
        blobs: Sequence[Blob] = (),
        quota: Quota = NO_QUOTA,
    ) -> Task | None:
        """Replace a task by what `step` makes of it; None is no task. What it raises is raised.

        Args:
            step: called again when another change came in between.
            blobs: sealed, one of each version that the change writes.
            quota: of its tenant.

        Raises:
            CondemnedError: a blob is no longer pending.
            QuotaExceededError: it would grow over it.
        """
        while True:
            before = await self.snapshot(task_id)
            after = step(before.task)
            if await self.commit(before, after, blobs, quota):
                return after

    async def commit(
        self,
        before: Snapshot,
        after: Task | None,
        blobs: Sequence[Blob],
        quota: Quota = NO_QUOTA,
    ) -> bool:
        """Replace the task in one step, if it is still as it was read.

        Raises:
            CondemnedError: a blob is no longer pending.
            QuotaExceededError: it would grow over the quota.
        """
        old = _versions(before.task)
        return await self._commits.commit(
            Kind.TASK,
            before.task_id,
            before.text,
            "" if after is None else task_to_json(after),
            sharing=sharing_to_json(after),
            size=0 if after is None else after.nbytes,
            quota=quota,
            blobs=[(blob, blob.version in old) for blob in blobs],
            dropped=sorted(old - _versions(after)),
        )


def existing(snapshot: Snapshot) -> Task:
    """The task.

    Raises:
        UnknownTaskError: there is none.
    """
    if snapshot.task is None:
        raise UnknownTaskError.named(owner_and_name(snapshot.task_id)[1])
    return snapshot.task


def _versions(task: Task | None) -> set[str]:
    return set() if task is None else {kept.version for kept in task.versions}
