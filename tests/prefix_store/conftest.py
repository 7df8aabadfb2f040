"""Real servers for the folder, emptied before each test that uses one.

Tests of the store run on the embedded Valkey, and on Redis over TCP with TLS and a password where
`redis-server` is installed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from prefix_store.embedded import EmbeddedValkey
from prefix_store.redis_store import RedisPrefixStore
from tests.prefix_store.servers import REDIS, redis_with_tls


@pytest_asyncio.fixture(scope="session")
async def valkey(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedValkey]:
    async with EmbeddedValkey(tmp_path_factory.mktemp("valkey")) as running:
        yield running


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Redis with TLS."""
    if REDIS is None:
        pytest.skip("no redis-server here")
    with redis_with_tls(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(params=["valkey", "redis"])
def url(request: pytest.FixtureRequest) -> str:
    """Where the store's server is."""
    if request.param == "redis":
        return str(request.getfixturevalue("redis_url"))
    return str(request.getfixturevalue("valkey").url)


@pytest_asyncio.fixture
async def redis(url: str) -> AsyncIterator[Redis]:
    """A plain client, to look at the keys behind the store's back."""
    async with Redis.from_url(url) as client:
        await client.flushall()
        yield client


@pytest_asyncio.fixture
async def store(url: str, redis: Redis) -> AsyncIterator[RedisPrefixStore]:
    store = RedisPrefixStore.from_url(url)
    yield store
    await store.close()
