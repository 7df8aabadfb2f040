"""Open the store that an operator names: a Redis, or the one kept in the data directory."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from prefix_store.data_dir import store_dir
from prefix_store.embedded import EmbeddedValkey
from prefix_store.errors import StoreUnavailableError
from prefix_store.redis_store import RedisPrefixStore
from prefix_store.redis_store.durability import NO_WAIT, Wait
from prefix_store.redis_store.store import KEEP_VERSIONS

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 5.0


@asynccontextmanager
async def opened_store(
    redis_url: str | None,
    data_dir: Path,
    *,
    answer_seconds: float = ANSWER_SECONDS,
    keep_versions: int = KEEP_VERSIONS,
    wait: Wait = NO_WAIT,
    join: bool = False,
) -> AsyncIterator[RedisPrefixStore]:
    """The store at `redis_url`, or without one the embedded store in `data_dir`; it answers.

    Args:
        answer_seconds: how long to wait for each answer.
        keep_versions, wait: see `RedisPrefixStore`.
        join: see `EmbeddedValkey`.

    Raises:
        StoreUnavailableError: not an address, `wait` for a cluster, nothing answers there, or the
            embedded store cannot start.
    """
    async with AsyncExitStack() as stack:
        embedded = redis_url is None
        if redis_url is None:
            valkey = EmbeddedValkey(store_dir(data_dir), join=join)
            redis_url = (await stack.enter_async_context(valkey)).url
        try:
            store = RedisPrefixStore.from_url(
                redis_url, timeout=answer_seconds, keep_versions=keep_versions, wait=wait
            )
        except ValueError as error:
            raise StoreUnavailableError(
                f"--redis-url is not an address of a store: {error}"
            ) from error
        stack.push_async_callback(store.close)
        await store.ping()
        await store.measure()
        for risk in () if embedded else await store.risks():
            logger.warning("the prefix store may lose what it acknowledged: %s", risk)
        yield store
