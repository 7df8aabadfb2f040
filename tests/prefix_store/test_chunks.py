"""Large artefacts: stored and read in pieces, in memory once at most."""

from __future__ import annotations

import tracemalloc
from collections.abc import AsyncIterator
from mmap import ACCESS_COPY, mmap
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from redis.asyncio import Redis

from prefix_store.artefact import Artefact
from prefix_store.errors import CorruptArtefactError, UnknownVersionError
from prefix_store.prefix import Prefix, version_of
from prefix_store.redis_store import RedisPrefixStore, layout
from prefix_store.redis_store.layout import Blob
from tests.prefix_store.examples import HEAD_DIM, HEADS, LAYERS, an_artefact

CHUNK_BYTES = 64 * 1024
POSITIONS = 40_000  # about 8 MB


@pytest_asyncio.fixture
async def store(url: str, redis: Redis) -> AsyncIterator[RedisPrefixStore]:
    store = RedisPrefixStore.from_url(url, chunk_bytes=CHUNK_BYTES)
    yield store
    await store.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A large artefact on disk."""
    path = tmp_path_factory.mktemp("large") / "prefix.safetensors"
    shape = (LAYERS, HEADS, POSITIONS, HEAD_DIM)
    path.write_bytes(Prefix.of(torch.randn(shape), torch.randn(shape), "test").to_bytes())
    return path


def contents(path: Path) -> bytes:
    return path.read_bytes()


def mapped(path: Path) -> Artefact:
    """The file as the server has it after an upload."""
    with path.open("rb") as opened:
        data = mmap(opened.fileno(), 0, access=ACCESS_COPY)
    return Artefact(Prefix.from_bytes(data), data, version_of(data))


async def test_a_large_artefact_is_in_memory_once_at_most(
    store: RedisPrefixStore, redis: Redis, file: Path
) -> None:
    tracemalloc.start()
    try:
        record = await store.put("large", mapped(file))
        assert tracemalloc.get_traced_memory()[1] < record.nbytes / 4
        sizes = [await redis.strlen(key) for key in await redis.keys("prefixserve:*")]
        assert (max(sizes), sum(sizes)) == (CHUNK_BYTES, record.nbytes)

        tracemalloc.reset_peak()
        data = await store.read(record.version)
        prefix = Prefix.from_bytes(data)
        assert tracemalloc.get_traced_memory()[1] < record.nbytes * 1.25
    finally:
        tracemalloc.stop()
    assert data == contents(file)
    assert prefix.prefix_length == POSITIONS


@pytest.mark.parametrize(
    ("start", "stop"),
    [(0, 1), (0, CHUNK_BYTES), (CHUNK_BYTES - 1, CHUNK_BYTES + 1), (100, 5 * CHUNK_BYTES), (7, 7)],
)
async def test_any_part_can_be_read(
    store: RedisPrefixStore, file: Path, start: int, stop: int
) -> None:
    record = await store.put("large", mapped(file))
    pieces = [piece async for piece in store.stream(record.version, start, stop)]
    assert b"".join(pieces) == contents(file)[start:stop]
    assert max(map(len, pieces), default=0) <= CHUNK_BYTES
    assert await store.size(record.version) == record.nbytes


async def test_a_download_goes_on_when_the_same_bytes_are_stored_anew(
    store: RedisPrefixStore, file: Path
) -> None:
    record = await store.put("large", mapped(file))
    data = b""
    async for piece in store.stream(record.version, 0, record.nbytes):
        data += piece
        if len(data) == 2 * CHUNK_BYTES:
            await store.put("other", mapped(file))
    assert data == contents(file)


async def test_a_download_of_a_version_that_goes_ends_with_an_error(
    store: RedisPrefixStore, file: Path
) -> None:
    record = await store.put("large", mapped(file))
    pieces = store.stream(record.version, 0, record.nbytes)
    await anext(pieces)
    await store.delete("large")
    with pytest.raises(UnknownVersionError):
        await anext(pieces)
    await pieces.aclose()


@pytest.mark.parametrize("damage", ["changed", "missing", "short"])
async def test_a_damaged_artefact_is_never_read_to_its_end(
    store: RedisPrefixStore, redis: Redis, file: Path, damage: str
) -> None:
    record = await store.put("large", mapped(file))
    blob = Blob.named(await redis.hget(layout.BLOBS, record.version))
    match damage:
        case "changed":
            await redis.setrange(blob.key(1), 9, b"!?")
        case "missing":
            await redis.delete(blob.key(3))
        case "short":
            await redis.set(blob.key(3), b"x")
    pieces: list[bytes] = []

    async def download() -> None:
        async for piece in store.stream(record.version, 0, record.nbytes):
            pieces.append(piece)

    with pytest.raises(CorruptArtefactError, match="upload the prefix again"):
        await download()
    assert sum(map(len, pieces)) < record.nbytes
    with pytest.raises(CorruptArtefactError):
        await store.read(record.version)

    await store.put("large", mapped(file))
    assert await store.read(record.version) == contents(file)


async def test_chunks_of_an_unfinished_upload_go_by_themselves(
    store: RedisPrefixStore, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.put("one", an_artefact())

    async def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store._blobs, "seal", killed)
    with pytest.raises(KeyboardInterrupt):
        await store.put("one", an_artefact(seed=1))

    ttls = [await redis.ttl(key) for key in await redis.keys("prefixserve:*")]
    assert sorted(ttl > 0 for ttl in ttls) == [False, True]
    assert (await store.get("one")).version == an_artefact().version
    [pending] = await redis.zrange(layout.PENDING, 0, -1)
    await redis.zadd(layout.PENDING, {pending: 0})
    assert await store.collect() == 1
    assert len(await redis.keys("prefixserve:*")) == 1
