"""The store on servers that an operator runs: replicas, settings, clusters and sentinels."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from redis.asyncio import Redis, Sentinel
from redis.asyncio.sentinel import MasterNotFoundError
from redis.exceptions import ResponseError

from prefix_store import directory as directory_module
from prefix_store.directory import Directory
from prefix_store.errors import StoreUnavailableError
from prefix_store.opening import opened_store
from prefix_store.redis_store import RedisPrefixStore
from prefix_store.redis_store.durability import NO_WAIT, Wait
from tests.prefix_store.examples import an_artefact
from tests.prefix_store.servers import (
    HOST,
    PASSWORD,
    REDIS,
    cluster,
    redis_with_tls,
    sentinel,
    valkey,
)

DEADLINE_SECONDS = 60
CHUNK_BYTES = 300


@pytest.mark.parametrize("wait", [Wait(replicas=1), Wait(replicas=1, aof=True)])
async def test_acknowledges_what_a_replica_has_and_nothing_else(tmp_path: Path, wait: Wait) -> None:
    with valkey(tmp_path / "master", "--appendonly", "yes") as port:
        url = f"redis://{HOST}:{port}"
        flags = ["--replicaof", HOST, str(port), "--appendonly", "yes"]
        async with store_at(url, wait, answer_seconds=20) as store:
            with valkey(tmp_path / "replica", *flags) as replica:
                record = await store.put("one", an_artefact())
                async with store_at(f"redis://{HOST}:{replica}") as copied:
                    assert (await copied.get("one")).record == record
        async with store_at(url, wait, answer_seconds=1) as store:
            with pytest.raises(StoreUnavailableError, match="0 of 1 replicas have confirmed it"):
                await store.put("two", an_artefact(seed=1))
            with pytest.raises(StoreUnavailableError, match="may still be lost"):
                await store.pin("one", True)
            with pytest.raises(StoreUnavailableError, match="may still be lost"):
                await store.delete("one")


async def test_waits_for_the_disk_alone(tmp_path: Path) -> None:
    with valkey(tmp_path, "--appendonly", "yes") as port:
        async with store_at(f"redis://{HOST}:{port}", Wait(aof=True), answer_seconds=20) as store:
            await store.put("one", an_artefact())


@asynccontextmanager
async def store_at(
    url: str, wait: Wait = NO_WAIT, *, answer_seconds: float = 5
) -> AsyncIterator[RedisPrefixStore]:
    store = RedisPrefixStore.from_url(
        url, timeout=answer_seconds, wait=wait, chunk_bytes=CHUNK_BYTES
    )
    try:
        yield store
    finally:
        await store.close()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--appendonly", "yes"], []),
        (["--appendonly", "yes", "--maxmemory-policy", "volatile-lru"], []),
        (["--appendonly", "yes", "--maxmemory-policy", "allkeys-lru"], ["drops prefixes"]),
        (["--save", ""], ["a restart loses every prefix"]),
        (["--save", "60 1"], ["only writes snapshots (save 60 1)"]),
        (["--save", "", "--maxmemory-policy", "allkeys-lfu"], ["allkeys-lfu", "a restart loses"]),
    ],
)
async def test_warns_of_a_server_that_may_lose_prefixes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, flags: list[str], says: list[str]
) -> None:
    caplog.set_level(logging.WARNING)
    with valkey(tmp_path, *flags) as port:
        async with opened_store(f"redis://{HOST}:{port}", tmp_path):
            pass

    assert len(caplog.messages) == len(says)
    for message, text in zip(caplog.messages, says, strict=True):
        assert text in message


async def test_a_server_that_forbids_config_is_used_all_the_same(tmp_path: Path) -> None:
    with valkey(tmp_path, "--save", "") as port:
        async with Redis(host=HOST, port=port) as client:
            await client.execute_command(
                "ACL", "SETUSER", "app", "on", f">{PASSWORD}", "~*", "&*", "+@all", "-config"
            )
        async with opened_store(f"redis://app:{PASSWORD}@{HOST}:{port}", tmp_path) as store:
            await store.put("one", an_artefact())
            assert await store.risks() == ()


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[int]]:
    with cluster(tmp_path_factory.mktemp("cluster")) as ports:
        yield ports


async def test_a_cluster_keeps_tasks_together_and_spreads_blobs(
    ports: list[int], tmp_path: Path
) -> None:
    url = f"redis+cluster://{HOST}:{ports[0]},{HOST}:{ports[1]}"
    async with store_at(url) as store:
        records = [await store.put(f"t{seed}", an_artefact(seed)) for seed in range(12)]
        assert [task.record for task in await store.list()] == sorted(
            records, key=lambda record: record.task_id
        )
        for seed, record in enumerate(records):
            assert await store.read(record.version) == an_artefact(seed).data
        for port in ports:
            async with Redis(host=HOST, port=port) as node:
                assert await node.dbsize() > 4, "each node has blobs"

        audit = await store.audit()
        assert [task.record for task in audit.tasks] == [task.record for task in await store.list()]
        assert (audit.unreferenced, audit.miscounted, audit.unreadable) == ((), (), ())

        newer = await store.put("t0", an_artefact(seed=1))
        assert (await store.rollback("t0")).version == records[0].version
        await store.delete_version("t0", newer.version)
        for record in records:
            await store.delete(record.task_id)
        assert await store.list() == []
        assert await store.collect() == 0
        left = 0
        for port in ports:
            async with Redis(host=HOST, port=port) as node:
                left += await node.dbsize()
        assert left == 2, "the revision and the log of changes"
    async with opened_store(url, tmp_path) as opened:
        assert await opened.list() == []


async def test_a_message_crosses_the_cluster(
    ports: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory_module, "POLL_SECONDS", 3600.0)
    writer, reader = (
        RedisPrefixStore.from_url(f"redis+cluster://{HOST}:{port}") for port in ports[1:]
    )
    directory = Directory(reader)
    await directory.start()
    try:
        for seed in range(3):
            record = await writer.put("one", an_artefact(seed))
            deadline = time.monotonic() + DEADLINE_SECONDS
            while (await directory.tasks.get("one")).record != record:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)
    finally:
        await directory.close()
        await writer.delete("one")
        await writer.close()
        await reader.close()


async def test_follows_the_master_that_a_sentinel_knows(tmp_path: Path) -> None:
    with (
        valkey(tmp_path / "master") as master,
        valkey(tmp_path / "replica", "--replicaof", HOST, str(master)) as replica,
        sentinel(tmp_path / "sentinel", master) as port,
    ):
        url = f"redis+sentinel://{HOST}:{port}/main/0"
        async with (
            store_at(url, Wait(replicas=1), answer_seconds=3) as store,
            Redis(host=HOST, port=port, decode_responses=True) as watch,
        ):
            first = await store.put("one", an_artefact())
            deadline = time.monotonic() + DEADLINE_SECONDS
            while not await fails_over(watch):
                assert time.monotonic() < deadline
                await asyncio.sleep(0.1)
            while await master_port(port) != replica:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.1)
            assert (await store.get("one")).record == first
            # The old master takes writes until it is told: they must not be acknowledged.
            second = None
            while second is None:
                assert time.monotonic() < deadline
                with suppress(StoreUnavailableError):
                    second = await store.put("two", an_artefact(seed=1))
        async with store_at(f"redis://{HOST}:{replica}") as direct:
            assert (await direct.get("two")).record == second


async def fails_over(watch: Redis) -> bool:
    """Whether the sentinel began to; it first has to know the replica."""
    try:
        await watch.execute_command("SENTINEL", "FAILOVER", "main")
    except ResponseError as error:
        return "INPROG" in str(error)
    return True


async def master_port(port: int) -> int:
    """The master that clients of the sentinel are sent to; a moment after the fail-over began."""
    sentinel = Sentinel([(HOST, port)])
    try:
        return int((await sentinel.discover_master("main"))[1])
    except MasterNotFoundError:
        return 0
    finally:
        await sentinel.aclose()


@pytest.mark.parametrize(
    "url",
    [
        "redis+cluster://",
        "redis+cluster://host:1,",
        "redis+sentinel://host:1",
        "redis+sentinel://host:x/main",
        "http://host",
    ],
)
async def test_an_address_that_is_none_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailableError, match="--redis-url is not an address"):
        async with opened_store(url, tmp_path):
            pass


@pytest.mark.parametrize("kind", ["redis+cluster", "redis+sentinel"])
async def test_nobody_there(kind: str, tmp_path: Path) -> None:
    url = f"{kind}://user:{PASSWORD}@{HOST}:1,{HOST}:2/{'main' if 'sentinel' in kind else ''}"
    with pytest.raises(StoreUnavailableError, match=rf"{HOST}:1, {HOST}:2 does not") as caught:
        async with opened_store(url, tmp_path, answer_seconds=1):
            pass
    assert PASSWORD not in str(caught.value)


@pytest.mark.skipif(REDIS is None, reason="no redis-server here")
async def test_a_certificate_that_is_not_trusted_is_refused(tmp_path: Path) -> None:
    with redis_with_tls(tmp_path) as url:
        async with opened_store(url, tmp_path):
            pass
        with pytest.raises(StoreUnavailableError, match="certificate verify failed"):
            async with opened_store(url.partition("?")[0], tmp_path, answer_seconds=2):
                pass
