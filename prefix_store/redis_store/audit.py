"""Whether the store's books agree with one another and with the keys that are there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from redis.asyncio import Redis

from prefix_store.errors import StoreUnavailableError
from prefix_store.redis_store import layout
from prefix_store.redis_store.layout import key_from_json, sharing_to_json, task_from_json
from prefix_store.store import Audit
from prefix_store.task import Task

_ATTEMPTS = 50
_SCANNED = 500
_NO_EXPIRY = -1


async def audit(client: Redis) -> Audit:
    """See `PrefixStore.audit`. Errors of the client pass through.

    Raises:
        StoreUnavailableError: tasks change too often to read the books between two changes.
    """
    books = await _books(client)
    tasks, unreadable = _parsed(books.tasks)
    users = Counter(record.version for task in tasks for record in task.versions)
    kept = {version.encode() for version in users}
    counted = {version: int(count) for version, count in books.users.items()}
    wrong = {
        version
        for version in kept | counted.keys()
        if counted.get(version, 0) != users[version.decode()]
    }
    # What a damaged task keeps is not known, so nothing can be called too much.
    extra = set() if unreadable else books.blobs.keys() - kept
    lost = await _lost_blobs(client)
    return Audit(
        tasks=tuple(tasks),
        unreadable=tuple(unreadable),
        unreferenced=_names(extra | lost),
        miscounted=() if unreadable else _names(wrong),
        mislisted=tuple(name for name in _mislisted(tasks, books.shared) if name not in unreadable),
        missized=tuple(name for name in _missized(tasks, books.sizes) if name not in unreadable),
        unreadable_keys=await _unreadable_keys(client),
    )


@dataclass(frozen=True, slots=True)
class _Books:
    tasks: Mapping[bytes, bytes]
    blobs: Mapping[bytes, bytes]
    users: Mapping[bytes, bytes]
    shared: Mapping[bytes, bytes]
    sizes: Mapping[bytes, bytes]


async def _books(client: Redis) -> _Books:
    """The hashes as they were at one moment: every change of them counts the revision up."""
    before = await client.get(layout.REVISION)
    for _ in range(_ATTEMPTS):
        books = _Books(
            await _hash(client, layout.TASKS),
            await _hash(client, layout.BLOBS),
            await _hash(client, layout.USERS),
            await _hash(client, layout.SHARED),
            await _sizes(client),
        )
        after = await client.get(layout.REVISION)
        if after == before:
            return books
        before = after
    raise StoreUnavailableError("tasks change too often for the store to be checked; try again")


async def _hash(client: Redis, key: str | bytes) -> dict[bytes, bytes]:
    entries: Any = client.hscan_iter(key, count=_SCANNED)
    return {name: value async for name, value in entries}


async def _sizes(client: Redis) -> dict[bytes, bytes]:
    """Of every tenant's tasks."""
    keys = [key async for key in client.scan_iter(match=f"{layout.STORED}:*", count=_SCANNED)]
    return {name: size for key in keys for name, size in (await _hash(client, key)).items()}


def _parsed(texts: Mapping[bytes, bytes]) -> tuple[list[Task], list[str]]:
    tasks, unreadable = [], []
    for name, text in sorted(texts.items()):
        task_id = name.decode(errors="replace")
        try:
            tasks.append(task_from_json(task_id, text))
        except (ValueError, KeyError, TypeError):
            unreadable.append(task_id)
    return tasks, unreadable


def _mislisted(tasks: list[Task], listed: Mapping[bytes, bytes]) -> tuple[str, ...]:
    right = {
        task.task_id.encode(): sharing_to_json(task).encode() for task in tasks if task.shared_with
    }
    names = right.keys() | listed.keys()
    return _names({name for name in names if right.get(name) != listed.get(name)})


def _missized(tasks: list[Task], sizes: Mapping[bytes, bytes]) -> tuple[str, ...]:
    right = {task.task_id.encode(): str(task.nbytes).encode() for task in tasks}
    names = right.keys() | sizes.keys()
    return _names({name for name in names if right.get(name) != sizes.get(name)})


async def _unreadable_keys(client: Redis) -> tuple[str, ...]:
    unreadable = set()
    for name, text in (await _hash(client, layout.KEYS)).items():
        try:
            key_from_json(name.decode(errors="replace"), text)
        except (ValueError, KeyError, TypeError):
            unreadable.add(name)
    return _names(unreadable)


async def _lost_blobs(client: Redis) -> set[bytes]:
    """Blobs with chunks that stay for ever though no list has them."""
    found: dict[bytes, bytes] = {}
    async for key in client.scan_iter(match="prefixserve:{*", count=_SCANNED):
        found.setdefault(key[key.index(b"{") + 1 : key.rindex(b"}")], key)
    # A blob moves from pending to stored to garbage only, so reading the lists in this order
    # meets each that was there when its chunk was found, unless it was deleted since.
    pending = set(await client.zrange(layout.PENDING, 0, -1))
    stored = set((await _hash(client, layout.BLOBS)).values())
    garbage = await cast("Any", client.smembers(layout.GARBAGE))
    unlisted = found.keys() - pending - stored - garbage
    return {name for name in unlisted if await client.ttl(found[name]) == _NO_EXPIRY}


def _names(found: set[bytes]) -> tuple[str, ...]:
    return tuple(sorted(name.decode(errors="replace") for name in found))
