"""Deletes, now and then, what interrupted uploads left in the store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from prefix_store.ending import end
from prefix_store.errors import StoreUnavailableError
from prefix_store.store import PrefixStore

logger = logging.getLogger(__name__)

COLLECT_SECONDS = 60.0


@asynccontextmanager
async def collecting(store: PrefixStore) -> AsyncIterator[None]:
    """Collect garbage while the context is open; servers on one store may do so at once."""
    running = asyncio.create_task(_collect(store))
    try:
        yield
    finally:
        await end(running)


async def _collect(store: PrefixStore) -> None:
    while True:
        try:
            if count := await store.collect():
                logger.info("deleted %d artefacts that no task keeps", count)
        except StoreUnavailableError:
            logger.debug("the store is away; its garbage waits")
        except Exception:
            logger.exception("collecting the store's garbage failed; trying again later")
        await asyncio.sleep(COLLECT_SECONDS)
