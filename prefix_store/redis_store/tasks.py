"""Tasks in Redis: read, compared and changed, and the log of changes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from redis.asyncio import Redis

from prefix_store.errors import UnknownTaskError
from prefix_store.redis_store import layout
from prefix_store.redis_store.blobs import CondemnedError
from prefix_store.redis_store.layout import Blob, task_from_json, task_to_json
from prefix_store.store import Changes
from prefix_store.task import Task

MAX_CHANGES = 10_000
_SCANNED = 500
_NONCES = 2**62
_START = "0-0"

# One atomic step: a reader sees the task before it or after it, never between. A change that is
# sent again, because its answer was lost, is known by its text and not made twice.
_COMMIT = """
local task_id, expected, new, nonce = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local most, channel, last_blob = ARGV[5], ARGV[6], 7 + 3 * ARGV[7]
local tasks, blobs, users, pending, garbage, revision, changes = unpack(KEYS)
local current = redis.call('HGET', tasks, task_id) or ''
if current == new then return 'done' end
if current ~= expected then return 'changed' end
for i = 8, last_blob, 3 do
  if not redis.call('ZSCORE', pending, ARGV[i]) then return 'condemned' end
end
for i = 8, last_blob, 3 do
  local blob, version, is_new = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  redis.call('ZREM', pending, blob)
  local old = redis.call('HGET', blobs, version)
  if old then redis.call('SADD', garbage, old) end
  redis.call('HSET', blobs, version, blob)
  if is_new == '1' then redis.call('HINCRBY', users, version, 1) end
end
for i = last_blob + 1, #ARGV do
  local version = ARGV[i]
  if redis.call('HINCRBY', users, version, -1) == 0 then
    redis.call('HDEL', users, version)
    redis.call('SADD', garbage, redis.call('HGET', blobs, version))
    redis.call('HDEL', blobs, version)
  end
end
if new == '' then
  redis.call('HDEL', tasks, task_id)
else
  redis.call('HSET', tasks, task_id, new)
end
local id = redis.call('INCR', revision) .. '-' .. nonce
redis.call('XADD', changes, 'MAXLEN', most, id, 'task', task_id)
redis.call('PUBLISH', channel, id)
return 'done'
"""
_COMMIT_KEYS = [
    layout.TASKS,
    layout.BLOBS,
    layout.USERS,
    layout.PENDING,
    layout.GARBAGE,
    layout.REVISION,
    layout.CHANGES,
]


_Entries = list[tuple[bytes, dict[bytes, bytes]]]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A task as it was read; None where there is none."""

    task_id: str
    text: bytes
    task: Task | None


class Tasks:
    """The tasks of a store. Errors of the client pass through."""

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._commit = client.register_script(_COMMIT)

    async def snapshot(self, task_id: str) -> Snapshot:
        """The task now."""
        text = await cast("asyncio.Future[bytes | None]", self._client.hget(layout.TASKS, task_id))
        if text is None:
            return Snapshot(task_id, b"", None)
        return Snapshot(task_id, text, task_from_json(task_id, text))

    async def get(self, task_id: str) -> Task:
        """See `PrefixStore.get`."""
        return existing(await self.snapshot(task_id))

    async def list(self) -> list[Task]:
        """See `PrefixStore.list`."""
        found: dict[str, Task] = {}
        # A scan may tell a task twice, but leaves out none that is there all the time.
        async for name, text in self._client.hscan_iter(layout.TASKS, count=_SCANNED):
            task_id = name.decode()
            found[task_id] = task_from_json(task_id, text)
        return [found[task_id] for task_id in sorted(found)]

    async def change(
        self, task_id: str, step: Callable[[Task | None], Task | None], blobs: Sequence[Blob] = ()
    ) -> Task | None:
        """Replace a task by what `step` makes of it; None is no task. What it raises is raised.

        Args:
            step: called again when another change came in between.
            blobs: sealed, one of each version that the change writes.

        Raises:
            CondemnedError: a blob is no longer pending.
        """
        while True:
            before = await self.snapshot(task_id)
            after = step(before.task)
            if await self.commit(before, after, blobs):
                return after

    async def commit(self, before: Snapshot, after: Task | None, blobs: Sequence[Blob]) -> bool:
        """Replace the task in one step, if it is still as it was read.

        Raises:
            CondemnedError: a blob is no longer pending.
        """
        old = set() if before.task is None else {kept.version for kept in before.task.versions}
        new = set() if after is None else {kept.version for kept in after.versions}
        args: list[Any] = [
            before.task_id,
            before.text,
            "" if after is None else task_to_json(after),
            random.randrange(_NONCES),  # noqa: S311
            MAX_CHANGES,
            layout.CHANGED,
            len(blobs),
        ]
        for blob in blobs:
            args += [blob.name, blob.version, int(blob.version not in old)]
        args += sorted(old - new)
        outcome = await self._commit(keys=_COMMIT_KEYS, args=args)
        if outcome == b"condemned":
            raise CondemnedError
        return bool(outcome == b"done")

    async def changes(self, since: str | None) -> Changes:
        """See `PrefixStore.changes`."""
        if since is not None:
            entries = cast(
                "_Entries",
                await self._client.xrange(layout.CHANGES, min=since, count=MAX_CHANGES),
            )
            # Its own entry comes first, unless it was dropped or the store has another history.
            if entries and entries[0][0].decode() == since:
                task_ids = (fields[b"task"].decode() for _, fields in entries[1:])
                return Changes(entries[-1][0].decode(), tuple(dict.fromkeys(task_ids)))
            if since == _START and not entries:
                return Changes(since, ())
        newest = cast("_Entries", await self._client.xrevrange(layout.CHANGES, count=1))
        return Changes(newest[0][0].decode() if newest else _START, None)


def existing(snapshot: Snapshot) -> Task:
    """The task.

    Raises:
        UnknownTaskError: there is none.
    """
    if snapshot.task is None:
        raise unknown(snapshot.task_id)
    return snapshot.task


def unknown(task_id: str) -> UnknownTaskError:
    """No task of this name."""
    return UnknownTaskError(f"no task {task_id[:80]!r}: upload its prefix, or check the name")
