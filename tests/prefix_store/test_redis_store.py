"""The store on a real Valkey."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from redis.asyncio import Redis

from prefix_store.embedded import EmbeddedValkey
from prefix_store.errors import (
    CorruptArtefactError,
    InvalidTaskIdError,
    StoreUnavailableError,
    UnknownTaskError,
    UnknownVersionError,
)
from prefix_store.prefix import version_of
from prefix_store.redis_store import RedisPrefixStore, layout
from prefix_store.redis_store.blobs import Blobs, CondemnedError
from prefix_store.redis_store.commits import Commits
from prefix_store.redis_store.tasks import Tasks
from prefix_store.store import Task
from tests.prefix_store.examples import LENGTH, an_artefact


async def test_a_task_is_what_was_put(store: RedisPrefixStore) -> None:
    before = time.time()
    artefact = an_artefact(method="cartridge", base_model="org/Größe", template="«{source}»\n")

    record = await store.put("e2e", artefact)

    assert (record.task_id, record.version) == ("e2e", version_of(artefact.data))
    assert (record.prefix_length, record.nbytes) == (LENGTH, len(artefact.data))
    assert (record.method, record.base_model) == ("cartridge", "org/Größe")
    assert record.template == "«{source}»\n"
    assert before <= record.created_at <= time.time()
    assert await store.get("e2e") == Task("e2e", record.version, (record,))
    assert await store.read(record.version) == artefact.data


async def test_a_task_with_a_blob_that_was_given_up_is_not_made(
    store: RedisPrefixStore, redis: Redis
) -> None:
    blobs, tasks = Blobs(redis, upload_seconds=60, chunk_bytes=2**20), Tasks(redis, Commits(redis))
    artefacts = [an_artefact(seed) for seed in range(2)]
    first, second = [await blobs.reserve(one.version, len(one.data)) for one in artefacts]
    for blob, one in zip((first, second), artefacts, strict=True):
        await blobs.write(blob, 0, one.data)
        await blobs.seal(blob)
    await blobs.abandon(second)
    await blobs.collect()
    records = tuple(one.record("two", 0.0) for one in artefacts)

    with pytest.raises(CondemnedError):
        await tasks.commit(
            await tasks.snapshot("two"),
            Task("two", records[0].version, records),
            [first, second],
        )

    assert await store.list() == []
    assert await redis.zrange(layout.PENDING, 0, -1) == [first.name.encode()]


async def test_lists_every_task_by_name(store: RedisPrefixStore) -> None:
    assert await store.list() == []
    records = [await store.put(name, an_artefact(seed)) for seed, name in enumerate("cab")]

    assert [task.record for task in await store.list()] == sorted(
        records, key=lambda record: record.task_id
    )


async def test_a_tenants_tasks_a_page_at_a_time(store: RedisPrefixStore) -> None:
    for seed, name in enumerate(("acme/b", "c", "a", "acme/a", "b")):
        await store.put(name, an_artefact(seed))
    await store.pin("b", True)

    async def page(tenant: str, limit: int, after: str) -> list[str]:
        return [task.task_id for task in await store.page(tenant, limit, after)]

    assert await page("default", 2, "") == ["a", "b"]
    assert await page("default", 2, "b") == ["c"]
    assert await page("default", 2, "c") == []
    assert await page("acme", 5, "acme/a") == ["acme/b"]
    assert await page("nobody", 5, "") == []
    assert [await store.count(tenant) for tenant in ("default", "acme", "nobody")] == [3, 2, 0]
    assert await store.count() == 5
    assert [task.task_id for task in await store.pinned()] == ["b"]


async def test_equal_artefacts_are_kept_once_and_go_with_the_last_task(
    store: RedisPrefixStore, redis: Redis
) -> None:
    one = await store.put("one", an_artefact())
    two = await store.put("two", an_artefact())
    assert one.version == two.version
    assert len(await chunks(redis)) == 1

    await store.delete("one")
    assert await store.read(two.version) == an_artefact().data

    await store.delete("two")
    assert await chunks(redis) == []
    assert set(await redis.keys("*")) == {layout.REVISION.encode(), layout.CHANGES.encode()}


async def test_keeps_the_last_versions_and_those_other_tasks_keep(url: str, redis: Redis) -> None:
    store = RedisPrefixStore.from_url(url, keep_versions=2)
    versions = [(await store.put("one", an_artefact(seed))).version for seed in range(2)]
    await store.put("two", an_artefact())

    versions.append((await store.put("one", an_artefact(seed=2))).version)
    task = await store.get("one")
    assert [record.version for record in task.versions] == versions[:0:-1]
    assert await store.read(versions[0]) == an_artefact().data

    await store.delete("two")
    with pytest.raises(UnknownVersionError, match=versions[0]):
        await store.read(versions[0])
    assert len(await chunks(redis)) == 2
    await store.close()


async def test_putting_the_same_again_keeps_it(store: RedisPrefixStore) -> None:
    await store.put("one", an_artefact())
    record = await store.put("one", an_artefact())

    assert await store.read(record.version) == an_artefact().data
    assert [task.record for task in await store.list()] == [record]


async def test_unknown_names(store: RedisPrefixStore) -> None:
    with pytest.raises(UnknownTaskError, match="no task 'nobody'"):
        await store.get("nobody")
    with pytest.raises(UnknownTaskError, match="no task 'nobody'"):
        await store.delete("nobody")
    with pytest.raises(UnknownVersionError, match="sha256:0"):
        await store.read("sha256:0")


async def test_a_bad_name_stores_nothing(store: RedisPrefixStore, redis: Redis) -> None:
    with pytest.raises(InvalidTaskIdError):
        await store.put("a/b/c", an_artefact())

    assert await redis.keys("*") == []


async def test_readers_see_a_task_before_or_after_never_between(
    store: RedisPrefixStore,
) -> None:
    prefixes = [an_artefact(seed, template=f"{seed} {{source}}") for seed in range(2)]
    templates = {one.version: one.prefix.template for one in prefixes}
    await store.put("busy", prefixes[0])
    seen = set()

    async def write() -> None:
        for turn in range(50):
            await store.put("busy", prefixes[turn % 2])

    async def read() -> None:
        while not writing.done():
            record = (await store.get("busy")).record
            assert record.template == templates[record.version]
            seen.add(record.version)

    writing = asyncio.create_task(write())
    await asyncio.gather(writing, read(), read(), read())
    assert seen == set(templates)


async def test_damage_is_noticed_and_mended_by_another_upload(
    store: RedisPrefixStore, redis: Redis
) -> None:
    record = await store.put("one", an_artefact())
    [key] = await chunks(redis)
    await redis.setrange(key, 500, b"!")

    with pytest.raises(CorruptArtefactError, match="upload the prefix again"):
        await store.read(record.version)

    await store.put("one", an_artefact())
    assert await store.read(record.version) == an_artefact().data


async def chunks(redis: Redis) -> list[bytes]:
    """The keys that hold artefacts' bytes."""
    return [key for key in await redis.keys("*") if key.startswith(b"prefixserve:{sha256:")]


async def _fails_everywhere(store: RedisPrefixStore, says: str) -> None:
    for call in (
        store.put("one", an_artefact()),
        store.get("one"),
        store.read("sha256:0"),
        store.list(),
        store.delete("one"),
        store.ping(),
    ):
        with pytest.raises(StoreUnavailableError, match=says):
            await call


async def test_a_store_that_was_killed_is_unavailable_until_it_is_back(tmp_path: Path) -> None:
    async with EmbeddedValkey(tmp_path) as valkey:
        store = RedisPrefixStore.from_url(valkey.url, timeout=1)
        await store.ping()
        record = await store.put("one", an_artefact())

        await valkey.stop()
        await _fails_everywhere(store, f"{tmp_path}/valkey.sock does not answer")

        await valkey.start()
        await store.ping()
        assert [task.record for task in await store.list()] == [record]
        await store.close()


async def test_a_store_that_hangs_is_unavailable() -> None:
    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        store = RedisPrefixStore.from_url(f"redis://127.0.0.1:{port}", timeout=0.05)
        with pytest.raises(StoreUnavailableError, match=f"127.0.0.1:{port} does not answer"):
            await store.ping()
        await store.close()


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://user:hunter2@127.0.0.1:1/0", "127.0.0.1:1"),
        ("rediss://:hunter2@127.0.0.1:1", "127.0.0.1:1"),
        ("redis://127.0.0.1:1?password=hunter2", "127.0.0.1:1"),
        ("unix://user:hunter2@/no/such.sock?db=0", "/no/such.sock"),
    ],
)
async def test_names_the_address_and_never_the_password(url: str, address: str) -> None:
    store = RedisPrefixStore.from_url(url, timeout=1)
    with pytest.raises(StoreUnavailableError, match=f"at {address} does not") as caught:
        await store.ping()

    assert "hunter2" not in str(caught.value)
    await store.close()


async def test_a_refused_password_is_not_shown(valkey: EmbeddedValkey) -> None:
    url = valkey.url.replace("unix://", "unix://user:hunter2@")
    store = RedisPrefixStore.from_url(url, timeout=1)
    with pytest.raises(StoreUnavailableError) as caught:
        await store.ping()

    assert "hunter2" not in str(caught.value)
    await store.close()


async def test_a_full_store_changes_nothing(store: RedisPrefixStore, redis: Redis) -> None:
    record = await store.put("one", an_artefact())
    await redis.config_set("maxmemory", "1")
    try:
        with pytest.raises(StoreUnavailableError, match="maxmemory"):
            await store.put("one", an_artefact(seed=1))
    finally:
        await redis.config_set("maxmemory", "0")

    assert [task.record for task in await store.list()] == [record]
    assert await store.read(record.version) == an_artefact().data


async def test_more_callers_than_connections(store: RedisPrefixStore) -> None:
    record = await store.put("one", an_artefact())

    assert {
        task.record for task in await asyncio.gather(*(store.get("one") for _ in range(200)))
    } == {record}
