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
from prefix_store.redis_store import RedisPrefixStore
from tests.prefix_store.examples import LENGTH, a_prefix


async def test_a_task_is_what_was_put(store: RedisPrefixStore) -> None:
    before = time.time()
    prefix = a_prefix(method="cartridge", base_model="org/Größe", template="«{source}»\n")
    artefact = prefix.to_bytes()

    record = await store.put("e2e", prefix)

    assert (record.task_id, record.version) == ("e2e", version_of(artefact))
    assert (record.prefix_length, record.nbytes) == (LENGTH, len(artefact))
    assert (record.method, record.base_model) == ("cartridge", "org/Größe")
    assert record.template == "«{source}»\n"
    assert before <= record.created_at <= time.time()
    assert await store.get("e2e") == record
    assert await store.read(record.version) == artefact


async def test_lists_every_task_by_name(store: RedisPrefixStore) -> None:
    assert await store.list() == []
    records = [await store.put(name, a_prefix(seed)) for seed, name in enumerate("cab")]

    assert await store.list() == sorted(records, key=lambda record: record.task_id)


async def test_equal_artefacts_are_kept_once_and_go_with_the_last_task(
    store: RedisPrefixStore, redis: Redis
) -> None:
    one = await store.put("one", a_prefix())
    two = await store.put("two", a_prefix())
    assert one.version == two.version
    assert len(await redis.keys("*:artefact:*")) == 1

    await store.delete("one")
    assert await store.read(two.version) == a_prefix().to_bytes()

    await store.delete("two")
    assert await redis.keys("*") == []


async def test_a_replaced_artefact_goes_unless_another_task_points_at_it(
    store: RedisPrefixStore,
) -> None:
    old = await store.put("one", a_prefix())
    await store.put("two", a_prefix())

    new = await store.put("one", a_prefix(seed=1))
    assert await store.get("one") == new
    assert await store.read(old.version) == a_prefix().to_bytes()

    await store.put("two", a_prefix(seed=1))
    with pytest.raises(UnknownVersionError, match=old.version):
        await store.read(old.version)


async def test_putting_the_same_again_keeps_it(store: RedisPrefixStore) -> None:
    await store.put("one", a_prefix())
    record = await store.put("one", a_prefix())

    assert await store.read(record.version) == a_prefix().to_bytes()
    assert await store.list() == [record]


async def test_unknown_names(store: RedisPrefixStore) -> None:
    with pytest.raises(UnknownTaskError, match="no task 'nobody'"):
        await store.get("nobody")
    with pytest.raises(UnknownTaskError, match="no task 'nobody'"):
        await store.delete("nobody")
    with pytest.raises(UnknownVersionError, match="sha256:0"):
        await store.read("sha256:0")


async def test_a_bad_name_stores_nothing(store: RedisPrefixStore, redis: Redis) -> None:
    with pytest.raises(InvalidTaskIdError):
        await store.put("a/b", a_prefix())

    assert await redis.keys("*") == []


async def test_readers_see_a_task_before_or_after_never_between(
    store: RedisPrefixStore,
) -> None:
    prefixes = [a_prefix(seed, template=f"{seed} {{source}}") for seed in range(2)]
    templates = {version_of(prefix.to_bytes()): prefix.template for prefix in prefixes}
    await store.put("busy", prefixes[0])
    seen = set()

    async def write() -> None:
        for turn in range(50):
            await store.put("busy", prefixes[turn % 2])

    async def read() -> None:
        while not writing.done():
            record = await store.get("busy")
            assert record.template == templates[record.version]
            seen.add(record.version)

    writing = asyncio.create_task(write())
    await asyncio.gather(writing, read(), read(), read())
    assert seen == set(templates)


async def test_damage_is_noticed_and_mended_by_another_upload(
    store: RedisPrefixStore, redis: Redis
) -> None:
    record = await store.put("one", a_prefix())
    [key] = await redis.keys("*:artefact:*")
    await redis.setrange(key, 500, b"!")

    with pytest.raises(CorruptArtefactError, match="upload the prefix again"):
        await store.read(record.version)

    await store.put("one", a_prefix())
    assert await store.read(record.version) == a_prefix().to_bytes()


async def _fails_everywhere(store: RedisPrefixStore, says: str) -> None:
    for call in (
        store.put("one", a_prefix()),
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
        record = await store.put("one", a_prefix())

        await valkey.stop()
        await _fails_everywhere(store, f"{tmp_path}/valkey.sock does not answer")

        await valkey.start()
        await store.ping()
        assert await store.list() == [record]
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
    record = await store.put("one", a_prefix())
    await redis.config_set("maxmemory", "1")
    try:
        with pytest.raises(StoreUnavailableError, match="maxmemory"):
            await store.put("one", a_prefix(seed=1))
    finally:
        await redis.config_set("maxmemory", "0")

    assert await store.list() == [record]
    assert await store.read(record.version) == a_prefix().to_bytes()


async def test_more_callers_than_connections(store: RedisPrefixStore) -> None:
    record = await store.put("one", a_prefix())

    assert set(await asyncio.gather(*(store.get("one") for _ in range(200)))) == {record}
