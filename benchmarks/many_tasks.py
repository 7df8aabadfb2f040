"""A server over a store with many tasks, which were put there directly."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families
from redis.asyncio import Redis

from benchmarks.http import running_server
from prefix_store.artefact import Artefact
from prefix_store.embedded import EmbeddedValkey
from prefix_store.prefix import Prefix
from prefix_store.redis_store import RedisPrefixStore

_AT_ONCE = 16


def task_name(number: int) -> str:
    """What task number `number` is called."""
    return f"task-{number}"


@dataclass(frozen=True, slots=True)
class TaskServer:
    """A running server and the store behind it, at `store_url`."""

    url: str
    store_url: str
    store: RedisPrefixStore

    async def register(self, prefix: Prefix, numbers: Iterable[int]) -> None:
        """Put tasks into the store, each with an artefact of its own: the same numbers, renamed."""
        limit = asyncio.Semaphore(_AT_ONCE)

        async def put(number: int) -> None:
            async with limit:
                own = replace(prefix, training={"number": str(number)})
                artefact = await asyncio.to_thread(Artefact.of, own)
                await self.store.put(task_name(number), artefact)

        await asyncio.gather(*map(put, numbers))

    async def store_bytes(self) -> int:
        """Memory that the store takes."""
        async with Redis.from_url(self.store_url) as client:
            return int((await client.info("memory"))["used_memory"])

    def metric(self, name: str, **labels: str) -> float:
        """One of the server's metrics now."""
        text = httpx.get(f"{self.url}/metrics").text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == f"prefixserve_{name}" and sample.labels == labels:
                    return float(sample.value)
        raise SystemExit(f"the server has no metric {name}")


@asynccontextmanager
async def task_server(*flags: str) -> AsyncIterator[TaskServer]:
    """A server process on a store that this process can write to."""
    with tempfile.TemporaryDirectory() as folder:
        async with EmbeddedValkey(Path(folder)) as valkey:
            store = RedisPrefixStore.from_url(valkey.url, timeout=60)
            try:
                with running_server("--redis-url", valkey.url, *flags) as server:
                    yield TaskServer(server.url, valkey.url, store)
            finally:
                await store.close()
