"""Background tasks end, also those that miss a cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from prefix_store.collector import collecting
from prefix_store.embedded import EmbeddedValkey
from prefix_store.ending import end
from prefix_store.redis_store import RedisPrefixStore

DEADLINE_SECONDS = 30


@asynccontextmanager
async def aclosing(store: RedisPrefixStore) -> AsyncIterator[None]:
    """Close it afterwards."""
    try:
        yield
    finally:
        await store.close()


async def test_a_task_that_loses_a_cancellation_ends() -> None:
    began = asyncio.Event()

    async def follow() -> None:
        while True:
            try:  # as redis's client does while it connects
                began.set()
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if not lost:
                    lost.append(True)
                    continue
                raise

    lost: list[bool] = []
    running = asyncio.create_task(follow())
    await began.wait()
    await end(running)
    assert running.cancelled()
    assert lost


async def test_collecting_ends_while_it_connects(valkey: EmbeddedValkey) -> None:
    for turn in range(20):
        store = RedisPrefixStore.from_url(valkey.url)
        async with asyncio.timeout(DEADLINE_SECONDS), aclosing(store), collecting(store):
            for _ in range(turn):  # a little further into it each time
                await asyncio.sleep(0)


async def test_what_a_task_raises_is_taken() -> None:
    async def fail() -> None:
        raise OSError

    failed = asyncio.create_task(fail())
    await asyncio.wait([failed])
    await end(failed, asyncio.create_task(asyncio.sleep(0)))
    await end()
    assert isinstance(failed.exception(), OSError)
