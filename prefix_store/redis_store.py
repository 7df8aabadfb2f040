"""The prefix store on any server that speaks Redis' protocol.

Keys, all under one hash tag so that a cluster keeps them on one node:

    {prefixserve}:tasks                  set of task ids
    {prefixserve}:task:<task_id>         hash, a TaskRecord
    {prefixserve}:artefact:<version>     string, the artefact's bytes
    {prefixserve}:users:<version>        set of the task ids that point at it
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import cast
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import RedisError

from prefix_store.errors import (
    CorruptArtefactError,
    StoreUnavailableError,
    UnknownTaskError,
    UnknownVersionError,
)
from prefix_store.prefix import Prefix, version_of
from prefix_store.store import TaskRecord
from prefix_store.task_id import check_task_id

_TAG = "{prefixserve}"
_TASKS = f"{_TAG}:tasks"
_MAX_CONNECTIONS = 32
_RETRIES = 3

# Each script is one atomic step: a reader sees the task before it or after it, never between.
_RELEASE = """
local function release(version, task_id)
  local users = '{prefixserve}:users:' .. version
  redis.call('SREM', users, task_id)
  if redis.call('EXISTS', users) == 0 then
    redis.call('DEL', '{prefixserve}:artefact:' .. version)
  end
end
"""
_PUT = (
    _RELEASE
    + """
local task_id, version, artefact = ARGV[1], ARGV[2], ARGV[3]
local old = redis.call('HGET', KEYS[1], 'version')
redis.call('SET', KEYS[2], artefact)
redis.call('SADD', KEYS[3], task_id)
redis.call('HSET', KEYS[1], unpack(ARGV, 4))
redis.call('SADD', KEYS[4], task_id)
if old and old ~= version then release(old, task_id) end
"""
)
_DELETE = (
    _RELEASE
    + """
local old = redis.call('HGET', KEYS[1], 'version')
if not old then return 0 end
redis.call('DEL', KEYS[1])
redis.call('SREM', KEYS[2], ARGV[1])
release(old, ARGV[1])
return 1
"""
)


_Fields = Mapping[bytes, bytes]


class RedisPrefixStore:
    """`PrefixStore` on a Redis or Valkey server. Use from one event loop; close it at the end."""

    def __init__(self, client: Redis, address: str) -> None:
        self._client = client
        self._address = address
        self._put = client.register_script(_PUT)
        self._delete = client.register_script(_DELETE)

    @classmethod
    def from_url(cls, url: str, *, timeout: float = 5.0) -> RedisPrefixStore:
        """A store at a `redis://`, `rediss://` or `unix://` URL; connects on first use.

        Args:
            timeout: most seconds to wait to connect, for each answer and for a free connection;
                a failed call is retried three times within about a second.

        Raises:
            ValueError: not such a URL.
        """
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=_MAX_CONNECTIONS,
            timeout=timeout,
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            retry=Retry(ExponentialWithJitterBackoff(cap=0.5, base=0.05), _RETRIES),
        )
        return cls(Redis.from_pool(pool), _address(url))

    async def put(self, task_id: str, prefix: Prefix) -> TaskRecord:
        """See `PrefixStore.put`."""
        check_task_id(task_id)
        artefact = await asyncio.to_thread(prefix.to_bytes)
        version = await asyncio.to_thread(version_of, artefact)
        record = TaskRecord(
            task_id=task_id,
            version=version,
            prefix_length=prefix.prefix_length,
            nbytes=len(artefact),
            method=prefix.method,
            base_model=prefix.base_model,
            template=prefix.template,
            created_at=time.time(),
        )
        fields = [text for name, value in asdict(record).items() for text in (name, str(value))]
        async with self._reaching():
            await self._put(
                keys=[_task(task_id), _artefact(version), f"{_TAG}:users:{version}", _TASKS],
                args=[task_id, version, artefact, *fields],
            )
        return record

    async def get(self, task_id: str) -> TaskRecord:
        """See `PrefixStore.get`."""
        async with self._reaching():
            fields = await self._client.hgetall(_task(task_id))
        if not fields:
            raise _unknown(task_id)
        return _record(cast("_Fields", fields))

    async def read(self, version: str) -> bytes:
        """See `PrefixStore.read`."""
        async with self._reaching():
            artefact = cast("bytes | None", await self._client.get(_artefact(version)))
        if artefact is None:
            raise UnknownVersionError(f"no task points at version {version[:80]!r} any more")
        found = await asyncio.to_thread(version_of, artefact)
        if found != version:
            raise CorruptArtefactError(
                f"the stored artefact of {version} hashes to {found}; upload the prefix again"
            )
        return artefact

    async def list(self) -> list[TaskRecord]:
        """See `PrefixStore.list`."""
        async with self._reaching(), self._client.pipeline(transaction=False) as pipeline:
            task_ids = cast("set[bytes]", await self._client.smembers(_TASKS))
            for task_id in sorted(task_ids):
                pipeline.hgetall(_task(task_id.decode()))
            found: list[_Fields] = await pipeline.execute()
        # A task deleted between the two reads has no fields any more.
        return [_record(fields) for fields in found if fields]

    async def delete(self, task_id: str) -> None:
        """See `PrefixStore.delete`."""
        async with self._reaching():
            deleted = await self._delete(keys=[_task(task_id), _TASKS], args=[task_id])
        if not deleted:
            raise _unknown(task_id)

    async def ping(self) -> None:
        """See `PrefixStore.ping`."""
        async with self._reaching():
            await self._client.ping()

    async def close(self) -> None:
        """See `PrefixStore.close`."""
        await self._client.aclose()

    @asynccontextmanager
    async def _reaching(self) -> AsyncIterator[None]:
        try:
            yield
        except (RedisError, OSError) as error:
            raise StoreUnavailableError(
                f"the prefix store at {self._address} does not answer: {error}"
            ) from error


def _task(task_id: str) -> str:
    return f"{_TAG}:task:{task_id}"


def _artefact(version: str) -> str:
    return f"{_TAG}:artefact:{version}"


def _unknown(task_id: str) -> UnknownTaskError:
    return UnknownTaskError(f"no task {task_id[:80]!r}: upload its prefix, or check the name")


def _record(fields: _Fields) -> TaskRecord:
    text = {name.decode(): value.decode() for name, value in fields.items()}
    return TaskRecord(
        task_id=text["task_id"],
        version=text["version"],
        prefix_length=int(text["prefix_length"]),
        nbytes=int(text["nbytes"]),
        method=text["method"],
        base_model=text["base_model"],
        template=text["template"],
        created_at=float(text["created_at"]),
    )


def _address(url: str) -> str:
    """The URL's host or socket without its user, password and query."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return parts.path
    return f"{parts.hostname or 'localhost'}:{parts.port or 6379}"
