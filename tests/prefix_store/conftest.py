"""A real Valkey server for the folder, emptied before each test that uses it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from prefix_store.embedded import EmbeddedValkey
from prefix_store.redis_store import RedisPrefixStore


@pytest_asyncio.fixture(scope="session")
async def valkey(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedValkey]:
    async with EmbeddedValkey(tmp_path_factory.mktemp("valkey")) as running:
        yield running


@pytest_asyncio.fixture
async def redis(valkey: EmbeddedValkey) -> AsyncIterator[Redis]:
    """A plain client, to look at the keys behind the store's back."""
    async with Redis.from_url(valkey.url) as client:
        await client.flushall()
        yield client


@pytest_asyncio.fixture
async def store(valkey: EmbeddedValkey, redis: Redis) -> AsyncIterator[RedisPrefixStore]:
    store = RedisPrefixStore.from_url(valkey.url)
    yield store
    await store.close()
