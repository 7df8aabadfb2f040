"""Changes of what is stored, each one atomic step, and the log of them."""

from __future__ import annotations

import random
from collections.abc import Iterable
from enum import Enum
from typing import Any, cast

from redis.asyncio import Redis

from prefix_store.quota import NO_QUOTA, Quota
from prefix_store.redis_store import layout
from prefix_store.redis_store.blobs import CondemnedError
from prefix_store.redis_store.layout import Blob
from prefix_store.store import Changes
from prefix_store.task_id import owner_and_name

MAX_CHANGES = 10_000
_NONCES = 2**62
_START = "0-0"

# A reader sees an entry before a change or after it, never between. A change that is sent again,
# because its answer was lost, is known by its text and not made twice.
_COMMIT = """
local kind, name, expected, new, sharing = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local nonce, most, channel, size = ARGV[6], ARGV[7], ARGV[8], tonumber(ARGV[9])
local max_bytes, max_tasks = tonumber(ARGV[10]), tonumber(ARGV[11])
local last_blob = 12 + 3 * ARGV[12]
local entries, stored, shared, blobs, users, pending, garbage, revision, changes = unpack(KEYS)
local current = redis.call('HGET', entries, name) or ''
if current == new then return 'done' end
if current ~= expected then return 'changed' end
if kind == 'task' and new ~= '' then
  local had = tonumber(redis.call('HGET', stored, name)) or 0
  if current == '' and max_tasks and redis.call('HLEN', stored) >= max_tasks then
    return 'tasks'
  end
  if max_bytes and size > had then
    local total = size - had
    for _, count in ipairs(redis.call('HVALS', stored)) do total = total + count end
    if total > max_bytes then return 'bytes' .. total end
  end
end
for i = 13, last_blob, 3 do
  if not redis.call('ZSCORE', pending, ARGV[i]) then return 'condemned' end
end
for i = 13, last_blob, 3 do
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
  redis.call('HDEL', entries, name)
else
  redis.call('HSET', entries, name, new)
end
if kind == 'task' then
  if new == '' then
    redis.call('HDEL', stored, name)
  else
    redis.call('HSET', stored, name, size)
  end
end
local told = {kind, name}
if kind == 'task' and (redis.call('HGET', shared, name) or '') ~= sharing then
  if sharing == '' then
    redis.call('HDEL', shared, name)
  else
    redis.call('HSET', shared, name, sharing)
  end
  told[3], told[4] = 'shared', name
end
local id = redis.call('INCR', revision) .. '-' .. nonce
redis.call('XADD', changes, 'MAXLEN', most, id, unpack(told))
redis.call('PUBLISH', channel, id)
return 'done'
"""
_COMMON_KEYS = [
    layout.SHARED,
    layout.BLOBS,
    layout.USERS,
    layout.PENDING,
    layout.GARBAGE,
    layout.REVISION,
    layout.CHANGES,
]

_Log = list[tuple[bytes, dict[bytes, bytes]]]


class Kind(Enum):
    """What is changed: its word in the log, and the hash that has it."""

    TASK = ("task", layout.TASKS)
    KEY = ("key", layout.KEYS)

    def __init__(self, word: str, entries: str) -> None:
        self.word = word
        self.entries = entries


class Commits:
    """The changes of a store. Errors of the client pass through."""

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._commit = client.register_script(_COMMIT)

    async def commit(
        self,
        kind: Kind,
        name: str,
        before: bytes,
        after: str,
        *,
        sharing: str = "",
        size: int = 0,
        quota: Quota = NO_QUOTA,
        blobs: Iterable[tuple[Blob, bool]] = (),
        dropped: Iterable[str] = (),
    ) -> bool:
        """Replace an entry in one step, if it is still as it was read; was it?

        Args:
            before, after: its text; empty is none.
            sharing: what the list of shared tasks has of the task then; empty is nothing.
            size: bytes of all versions that the task keeps then.
            quota: of the tenant.
            blobs: sealed, of versions that the task has now, and whether it had each before.
            dropped: versions that the task has no longer.

        Raises:
            CondemnedError: a blob is no longer pending.
            QuotaExceededError: the task would grow over it.
        """
        nonce = random.randrange(_NONCES)  # noqa: S311
        args: list[Any] = [kind.word, name, before, after, sharing, nonce]
        args += [MAX_CHANGES, layout.CHANGED, size]
        args += ["" if most is None else most for most in (quota.nbytes, quota.tasks)]
        written = [(blob.name, blob.version, int(not had)) for blob, had in blobs]
        args.append(len(written))
        for one in written:
            args += one
        args += dropped
        tenant = owner_and_name(name)[0]
        keys = [kind.entries, layout.stored(tenant), *_COMMON_KEYS]
        outcome: bytes = await self._commit(keys=keys, args=args)
        if outcome == b"condemned":
            raise CondemnedError
        if outcome == b"tasks":
            raise quota.too_many_tasks(tenant)
        if outcome.startswith(b"bytes"):
            raise quota.too_many_bytes(tenant, int(outcome.removeprefix(b"bytes")))
        return bool(outcome == b"done")

    async def changes(self, since: str | None) -> Changes:
        """See `PrefixStore.changes`."""
        if since is not None:
            log = cast(
                "_Log", await self._client.xrange(layout.CHANGES, min=since, count=MAX_CHANGES)
            )
            # Its own entry comes first, unless it was dropped or the store has another history.
            if log and log[0][0].decode() == since:
                return _changes_of(log)
            if since == _START and not log:
                return Changes(since, (), (), sharing=False)
        newest = cast("_Log", await self._client.xrevrange(layout.CHANGES, count=1))
        return Changes(newest[0][0].decode() if newest else _START, None, None, sharing=True)


def _changes_of(log: _Log) -> Changes:
    """What came after the first entry."""
    changed = {
        kind: tuple(
            dict.fromkeys(
                fields[kind.word.encode()].decode()
                for _, fields in log[1:]
                if kind.word.encode() in fields
            )
        )
        for kind in Kind
    }
    return Changes(
        log[-1][0].decode(),
        changed[Kind.TASK],
        changed[Kind.KEY],
        sharing=any(b"shared" in fields for _, fields in log[1:]),
    )
