"""`PrefixStore` on a Redis or Valkey server."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from dataclasses import replace
from typing import cast
from urllib.parse import urlsplit

from redis.asyncio.client import PubSub

from prefix_store.artefact import Artefact
from prefix_store.condition import ALWAYS, Condition
from prefix_store.errors import PrefixStoreError, UnknownTaskError
from prefix_store.quota import NO_QUOTA, Quota
from prefix_store.redis_store import layout
from prefix_store.redis_store.audit import audit
from prefix_store.redis_store.blobs import Blobs, CondemnedError
from prefix_store.redis_store.commits import Commits
from prefix_store.redis_store.connecting import FAILURES, Connected, connect
from prefix_store.redis_store.durability import NO_WAIT, Wait, risks
from prefix_store.redis_store.keys import RedisKeyStore
from prefix_store.redis_store.layout import Blob
from prefix_store.redis_store.tasks import Tasks
from prefix_store.store import Audit, Changes, Subscription
from prefix_store.task import (
    Task,
    TaskRecord,
    activated,
    created,
    divided,
    rolled_back,
    shared,
    uploaded,
    without,
)
from prefix_store.task_id import check_stored_name, owner_and_name

KEEP_VERSIONS = 5
UPLOAD_SECONDS = 900


class RedisPrefixStore:
    """`PrefixStore` on a Redis or Valkey server. Use from one event loop; close it at the end."""

    def __init__(
        self,
        connected: Connected,
        *,
        wait: Wait = NO_WAIT,
        keep_versions: int = KEEP_VERSIONS,
        upload_seconds: int = UPLOAD_SECONDS,
        chunk_bytes: int = layout.CHUNK_BYTES,
    ) -> None:
        """
        Args:
            wait: what every change waits for before it returns.
            keep_versions: versions kept of each task, at least 1; those in use count.
            upload_seconds: how long writing one artefact to the server may take.
            chunk_bytes: size of the pieces that artefacts are stored in.
        """
        self._connected = connected
        self._client = client = connected.client
        self._wait = wait
        self._keep_versions = keep_versions
        self._commits = Commits(client)
        self._tasks = Tasks(client, self._commits)
        self._keys = RedisKeyStore(connected, self._commits, wait)
        self._blobs = Blobs(client, upload_seconds, chunk_bytes)

    @classmethod
    def from_url(
        cls,
        url: str,
        *,
        timeout: float = 5.0,
        keep_versions: int = KEEP_VERSIONS,
        chunk_bytes: int = layout.CHUNK_BYTES,
        wait: Wait = NO_WAIT,
    ) -> RedisPrefixStore:
        """A store at a URL; connects on first use.

        Args:
            url, timeout: see `connect`.
            keep_versions, chunk_bytes, wait: see `RedisPrefixStore`.

        Raises:
            ValueError: not such a URL; or `wait` for a cluster, where it would have to ask each
                node that a change touches.
        """
        if wait and urlsplit(url).scheme.endswith("+cluster"):
            raise ValueError("a cluster with --store-wait-replicas or --store-wait-aof; unset them")
        return cls(
            connect(url, timeout),
            wait=wait,
            keep_versions=keep_versions,
            chunk_bytes=chunk_bytes,
        )

    @property
    def keys(self) -> RedisKeyStore:
        """See `PrefixStore.keys`."""
        return self._keys

    @property
    def connection(self) -> Connected:
        """How it reaches the server, for what else is kept there."""
        return self._connected

    async def put(
        self,
        task_id: str,
        artefact: Artefact,
        *,
        activate: bool = True,
        condition: Condition = ALWAYS,
        quota: Quota = NO_QUOTA,
    ) -> TaskRecord:
        """See `PrefixStore.put`."""
        record = artefact.record(check_stored_name(task_id), time.time())

        def step(task: Task | None) -> Task:
            condition.check(owner_and_name(task_id)[1], None if task is None else task.version)
            if task is not None:
                return uploaded(task, record, activate=activate, keep=self._keep_versions)
            if not activate:
                raise UnknownTaskError.named(owner_and_name(task_id)[1])
            return created(record)

        async with self._connected.reaching():
            # Before any byte is written.
            after = step((await self._tasks.snapshot(task_id)).task)
            await self._tasks.check_quota(after, quota)
            await self._publish(task_id, [artefact], step, quota)
        return record

    async def restore(
        self, task: Task, artefacts: Sequence[Artefact], condition: Condition = ALWAYS
    ) -> None:
        """See `PrefixStore.restore`."""
        check_stored_name(task.task_id)

        def step(found: Task | None) -> Task:
            condition.check(task.name, None if found is None else found.version)
            return task

        async with self._connected.reaching():
            await self._publish(task.task_id, artefacts, step)

    async def activate(self, task_id: str, version: str, condition: Condition = ALWAYS) -> Task:
        """See `PrefixStore.activate`."""
        return await self._change(task_id, lambda task: activated(task, version), condition)

    async def rollback(self, task_id: str, condition: Condition = ALWAYS) -> Task:
        """See `PrefixStore.rollback`."""
        return await self._change(task_id, rolled_back, condition)

    async def split(
        self, task_id: str, shares: Mapping[str, int], condition: Condition = ALWAYS
    ) -> Task:
        """See `PrefixStore.split`."""
        return await self._change(task_id, lambda task: divided(task, shares), condition)

    async def pin(self, task_id: str, pinned: bool, condition: Condition = ALWAYS) -> Task:
        """See `PrefixStore.pin`."""
        return await self._change(task_id, lambda task: replace(task, pinned=pinned), condition)

    async def share(
        self, task_id: str, tenants: Sequence[str], condition: Condition = ALWAYS
    ) -> Task:
        """See `PrefixStore.share`."""
        return await self._change(task_id, lambda task: shared(task, tenants), condition)

    async def delete_version(
        self, task_id: str, version: str, condition: Condition = ALWAYS
    ) -> Task:
        """See `PrefixStore.delete_version`."""
        return await self._change(task_id, lambda task: without(task, version), condition)

    async def delete(self, task_id: str, condition: Condition = ALWAYS) -> None:
        """See `PrefixStore.delete`."""

        def step(task: Task | None) -> None:
            _check_exists(task_id, task, condition)

        async with self._connected.reaching():
            await self._tasks.change(task_id, step)
            await self._confirm()
            await self._tidy()

    async def get(self, task_id: str) -> Task:
        """See `PrefixStore.get`."""
        async with self._connected.reaching():
            return await self._tasks.get(task_id)

    async def page(self, tenant: str, limit: int, after: str) -> list[Task]:
        """See `PrefixStore.page`."""
        async with self._connected.reaching():
            return await self._tasks.page(tenant, limit, after)

    async def count(self, tenant: str | None = None) -> int:
        """See `PrefixStore.count`."""
        async with self._connected.reaching():
            return await self._tasks.count(tenant)

    async def pinned(self) -> list[Task]:
        """See `PrefixStore.pinned`."""
        async with self._connected.reaching():
            return await self._tasks.pinned()

    async def list(self, tenant: str | None = None) -> list[Task]:
        """See `PrefixStore.list`."""
        async with self._connected.reaching():
            return await self._tasks.list(tenant)

    async def shared(self) -> dict[str, frozenset[str]]:
        """See `PrefixStore.shared`."""
        async with self._connected.reaching():
            return await self._tasks.shared()

    async def size(self, version: str) -> int:
        """See `PrefixStore.size`."""
        async with self._connected.reaching():
            return (await self._blobs.stored(version)).nbytes

    async def read(self, version: str) -> bytearray:
        """See `PrefixStore.read`."""
        async with self._connected.reaching():
            return await self._blobs.read(version)

    async def stream(self, version: str, start: int, stop: int) -> AsyncGenerator[bytes]:
        """See `PrefixStore.stream`."""
        async with (
            self._connected.reaching(),
            aclosing(self._blobs.stream(version, start, stop)) as pieces,
        ):
            async for piece in pieces:
                yield piece

    async def changes(self, since: str | None) -> Changes:
        """See `PrefixStore.changes`."""
        async with self._connected.reaching():
            return await self._commits.changes(since)

    @asynccontextmanager
    async def subscribe(self) -> AsyncIterator[Subscription]:
        """See `PrefixStore.subscribe`."""
        async with self._client.pubsub() as pubsub:
            async with self._connected.reaching():
                await pubsub.subscribe(layout.CHANGED)
            yield _Subscription(pubsub, self._connected.reaching)

    async def collect(self) -> int:
        """See `PrefixStore.collect`."""
        async with self._connected.reaching():
            return await self._blobs.collect()

    async def audit(self) -> Audit:
        """See `PrefixStore.audit`."""
        async with self._connected.reaching():
            return await audit(self._client)

    async def measure(self) -> None:
        """Write down the sizes of tasks, in a store that is older than quotas."""
        async with self._connected.reaching():
            await self._tasks.measure()

    async def ping(self) -> None:
        """See `PrefixStore.ping`."""
        async with self._connected.reaching():
            await self._client.ping()

    async def risks(self) -> tuple[str, ...]:
        """What the server's settings could lose, in words for its operator."""
        async with self._connected.reaching():
            return await risks(self._client)

    async def close(self) -> None:
        """See `PrefixStore.close`."""
        await self._connected.close()

    async def _publish(
        self,
        task_id: str,
        artefacts: Sequence[Artefact],
        step: Callable[[Task | None], Task],
        quota: Quota = NO_QUOTA,
    ) -> None:
        """Write the bytes, then change the task to have them; again if that took too long."""
        while True:
            blobs: list[Blob] = []
            try:
                for artefact in artefacts:
                    blobs.append(await self._blobs.reserve(artefact.version, len(artefact.data)))
                    for index in range(len(blobs[-1].keys)):
                        await self._blobs.write(blobs[-1], index, artefact.data)
                    await self._blobs.seal(blobs[-1])
                await self._tasks.change(task_id, step, blobs, quota)
            except (CondemnedError, PrefixStoreError) as error:
                for blob in blobs:
                    await self._blobs.abandon(blob)
                await self._tidy()
                if isinstance(error, CondemnedError):
                    continue
                raise
            await self._confirm()
            await self._tidy()
            return

    async def _change(
        self, task_id: str, change: Callable[[Task], Task], condition: Condition
    ) -> Task:
        def step(task: Task | None) -> Task:
            return change(_check_exists(task_id, task, condition))

        async with self._connected.reaching():
            task = await self._tasks.change(task_id, step)
            await self._confirm()
            await self._tidy()
        return cast("Task", task)

    async def _confirm(self) -> None:
        await self._wait.confirm(self._client, self._connected.timeout)

    async def _tidy(self) -> None:
        """Delete what a change left over; where that fails it stays for `collect`."""
        with suppress(*FAILURES):
            await self._blobs.collect()


class _Subscription:
    """See `Subscription`."""

    def __init__(
        self, pubsub: PubSub, reaching: Callable[[], AbstractAsyncContextManager[None]]
    ) -> None:
        self._pubsub = pubsub
        self._reaching = reaching

    async def wait(self, seconds: float) -> None:
        """See `Subscription.wait`."""
        async with self._reaching():
            await self._pubsub.get_message(ignore_subscribe_messages=True, timeout=seconds)


def _check_exists(task_id: str, task: Task | None, condition: Condition) -> Task:
    condition.check(owner_and_name(task_id)[1], None if task is None else task.version)
    if task is None:
        raise UnknownTaskError.named(owner_and_name(task_id)[1])
    return task
