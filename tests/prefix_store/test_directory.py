"""A directory follows its store through changes, dropped connections and outages."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from prefix_store import directory as directory_module
from prefix_store import lookups as lookups_module
from prefix_store.api_key import ApiKey, Scope, kept_of, new_key_text
from prefix_store.directory import Directory
from prefix_store.embedded import EmbeddedValkey
from prefix_store.errors import StoreUnavailableError, UnknownKeyError, UnknownTaskError
from prefix_store.redis_store import RedisPrefixStore, commits, layout
from tests.prefix_store.examples import an_artefact

DEADLINE_SECONDS = 30
NEVER = 3600.0


@pytest_asyncio.fixture
async def writer(url: str) -> AsyncIterator[RedisPrefixStore]:
    """The store as another server has it."""
    store = RedisPrefixStore.from_url(url)
    yield store
    await store.close()


@pytest_asyncio.fixture
async def directory(store: RedisPrefixStore) -> AsyncIterator[Directory]:
    directory = Directory(store)
    await directory.start()
    yield directory
    await directory.close()


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not await holds():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.01)


async def follows(directory: Directory, task_id: str, version: str | None) -> None:
    """Wait until the directory has the task at this version, or no task."""

    async def holds() -> bool:
        try:
            return (await directory.tasks.get(task_id)).version == version
        except UnknownTaskError:
            return version is None

    await until(holds)


async def lookups(redis: Redis) -> int:
    """How often any task was looked up in the store since it started."""
    found = await redis.info("commandstats")
    return int(found.get("cmdstat_hget", {"calls": 0})["calls"])


async def subscribed(redis: Redis) -> None:
    async def holds() -> bool:
        return (await redis.pubsub_numsub(layout.CHANGED))[0][1] == 1

    await until(holds)


@pytest.mark.parametrize("lost", ["nothing", "message", "connection"])
async def test_sees_what_another_server_changes(
    directory: Directory,
    writer: RedisPrefixStore,
    redis: Redis,
    monkeypatch: pytest.MonkeyPatch,
    lost: str,
) -> None:
    await subscribed(redis)
    if lost == "message":
        monkeypatch.setattr(layout, "CHANGED", "{prefixserve}:nobody-listens")
    else:  # then nothing but a message, or the end of the connection, wakes it
        monkeypatch.setattr(directory_module, "POLL_SECONDS", NEVER)
    await follows(directory, "one", None)
    for seed in range(3):
        record = await writer.put("one", an_artefact(seed))
        if lost == "connection":
            await redis.client_kill_filter(_type="pubsub")
        await follows(directory, "one", record.version)
    await writer.rollback("one")
    if lost == "connection":
        await redis.client_kill_filter(_type="pubsub")
    await follows(directory, "one", an_artefact(1).version)
    await writer.delete("one")
    if lost == "connection":
        await redis.client_kill_filter(_type="pubsub")
    await follows(directory, "one", None)


async def test_closes_while_its_connection_is_being_made_anew(
    store: RedisPrefixStore, redis: Redis
) -> None:
    for turn in range(20):
        directory = Directory(store)
        await directory.start()
        await subscribed(redis)
        await redis.client_kill_filter(_type="pubsub")
        for _ in range(turn):  # a little further into it each time
            await asyncio.sleep(0)
        async with asyncio.timeout(DEADLINE_SECONDS):
            await directory.close()


async def test_looks_a_task_up_once_however_many_ask(
    directory: Directory, writer: RedisPrefixStore, redis: Redis
) -> None:
    await writer.put("one", an_artefact())
    await follows(directory, "one", an_artefact().version)
    before = await lookups(redis)

    directory.tasks.forget("one")
    await asyncio.gather(*(directory.tasks.get("one") for _ in range(50)))
    await directory.tasks.get("one")
    assert await lookups(redis) == before + 1

    for _ in range(5):
        with pytest.raises(UnknownTaskError, match="nobody"):
            await directory.tasks.get("nobody")
    assert await lookups(redis) == before + 2


async def test_a_look_up_that_a_change_overtook_is_not_remembered(
    directory: Directory, writer: RedisPrefixStore, redis: Redis
) -> None:
    await writer.put("one", an_artefact())
    before = await lookups(redis)
    first = asyncio.create_task(directory.tasks.get("one"))
    await asyncio.sleep(0)
    directory.tasks.forget("one")
    await first
    await directory.tasks.get("one")
    assert await lookups(redis) == before + 2


async def test_a_cancelled_request_leaves_the_look_up_to_the_others(
    directory: Directory, writer: RedisPrefixStore
) -> None:
    await writer.put("one", an_artefact())
    first, second = (asyncio.create_task(directory.tasks.get("one")) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).task_id == "one"


async def test_forgets_what_was_not_asked_for_longest(
    directory: Directory,
    writer: RedisPrefixStore,
    redis: Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lookups_module, "MAX_KNOWN", 2)
    monkeypatch.setattr(lookups_module, "MAX_UNKNOWN", 2)
    monkeypatch.setattr(directory_module, "POLL_SECONDS", NEVER)
    for name in "abc":
        await writer.put(name, an_artefact())
        await follows(directory, name, an_artefact().version)

    async def asked(name: str) -> int:
        before = await lookups(redis)
        with suppress(UnknownTaskError):
            await directory.tasks.get(name)
        return await lookups(redis) - before

    assert [await asked(name) for name in "abaca"] == [1, 1, 0, 1, 0]
    assert [await asked(name) for name in "xyxzx"] == [1, 1, 0, 1, 0]


async def test_goes_on_without_the_store_and_recovers(tmp_path: Path) -> None:
    told: list[bool] = []
    async with EmbeddedValkey(tmp_path) as valkey:
        store = RedisPrefixStore.from_url(valkey.url, timeout=1)
        directory = Directory(store, lookup_seconds=2, on_connected=told.append)
        await directory.start()
        known = await store.put("known", an_artefact())
        await store.put("other", an_artefact())
        await follows(directory, "known", known.version)
        await follows(directory, "nobody", None)

        await valkey.stop()

        async def away() -> bool:
            return not directory.connected

        await until(away)
        assert (await directory.tasks.get("known")).record == known
        for name in ("other", "nobody"):
            with pytest.raises(StoreUnavailableError):
                await directory.tasks.get(name)

        await valkey.start()
        newer = await store.put("known", an_artefact(seed=1))
        await store.put("nobody", an_artefact(seed=1))
        await follows(directory, "known", newer.version)
        await follows(directory, "nobody", newer.version)

        async def back() -> bool:
            return directory.connected

        await until(back)
        assert told == [True, False, True]
        await directory.close()
        await store.close()


async def test_the_log_of_changes(
    store: RedisPrefixStore, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = (await store.changes(None)).position
    assert (await store.changes(start)).task_ids == ()
    await store.put("one", an_artefact())
    first = await store.changes(None)
    assert await store.changes(start) == first, "before the first change nothing was known"
    await store.put("one", an_artefact(seed=1))
    await store.put("two", an_artefact())
    await store.activate("one", an_artefact().version)
    later = await store.changes(first.position)
    assert later.task_ids == ("one", "two")
    assert (await store.changes(later.position)).task_ids == ()
    assert int(await redis.get(layout.REVISION)) == 4

    monkeypatch.setattr(commits, "MAX_CHANGES", 3)
    await store.delete("two")
    assert (await store.changes(later.position)).task_ids == ("two",)
    assert (await store.changes(first.position)).task_ids is None, "cut off by now"


async def test_another_history_with_as_many_changes_is_noticed(
    store: RedisPrefixStore, redis: Redis
) -> None:
    await store.put("one", an_artefact())
    position = (await store.changes(None)).position
    await redis.flushall()
    assert (await store.changes(position)).task_ids is None
    await store.put("two", an_artefact())
    assert (await store.changes(position)).task_ids is None


async def test_follows_keys_as_it_follows_tasks(
    directory: Directory, writer: RedisPrefixStore, redis: Redis
) -> None:
    await subscribed(redis)
    key = kept_of(new_key_text(), "acme", [Scope.GENERATE], label="", now=0.0)

    async def is_known(expected: ApiKey | None) -> None:
        async def holds() -> bool:
            try:
                return await directory.keys.get(key.key_id) == expected
            except UnknownKeyError:
                return expected is None

        await until(holds)

    await is_known(None)
    await writer.keys.change(key.key_id, lambda _: key)
    await is_known(key)

    async def is_remembered() -> bool:  # once the directory, too, has heard of the change
        before = await lookups(redis)
        assert await directory.keys.get(key.key_id) == key
        return await lookups(redis) == before

    await until(is_remembered)
    revoked = replace(key, revoked_at=1.0)
    await writer.keys.change(key.key_id, lambda _: revoked)
    await is_known(revoked)
    assert await writer.keys.list() == [revoked]


async def test_knows_what_is_shared_without_a_look_up(
    directory: Directory, writer: RedisPrefixStore, redis: Redis
) -> None:
    async def shared(*expected: str) -> None:
        async def holds() -> bool:
            return directory.shared_with("beta") == list(expected)

        await until(holds)

    await writer.put("acme/one", an_artefact())
    await writer.put("acme/two", an_artefact())
    await writer.share("acme/one", ["beta", "gamma"])
    await shared("acme/one")
    await writer.share("acme/two", ["public", "gamma"])
    await shared("acme/one", "acme/two")
    before = await lookups(redis)
    assert directory.is_shared("acme/one", "gamma")
    assert not directory.is_shared("acme/one", "delta")
    assert directory.is_shared("acme/two", "delta")
    assert not directory.is_shared("acme/none", "beta")
    assert await lookups(redis) == before
    assert (await writer.get("acme/two")).shared_with == ("public",)
    await writer.put("acme/one", an_artefact(seed=1))
    await shared("acme/one", "acme/two")
    await writer.delete("acme/two")
    await shared("acme/one")
    await writer.put("acme/two", an_artefact())
    await writer.share("acme/one", [])
    await shared()
    assert await redis.exists(layout.SHARED) == 0


async def test_a_directory_that_starts_late_knows_what_is_shared(
    store: RedisPrefixStore, writer: RedisPrefixStore
) -> None:
    await writer.put("acme/one", an_artefact())
    await writer.share("acme/one", ["beta"])
    directory = Directory(store)
    await directory.start()
    assert directory.is_shared("acme/one", "beta")
    await directory.close()


async def test_a_key_never_changes_the_sharing_of_a_task_of_its_name(
    store: RedisPrefixStore,
) -> None:
    await store.put("admin", an_artefact())
    await store.share("admin", ["beta"])
    key = kept_of(new_key_text("admin"), "default", Scope, label="", now=0.0)
    await store.keys.change("admin", lambda _: key)
    assert await store.shared() == {"admin": frozenset({"beta"})}
