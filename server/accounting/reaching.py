"""Calls to the Redis server that requests do not wait for while it is away."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from redis.exceptions import RedisClusterException, RedisError

from prefix_store.errors import StoreUnavailableError

logger = logging.getLogger(__name__)

_AGAIN_SECONDS = 1.0

T = TypeVar("T")


@asynccontextmanager
async def reaching() -> AsyncIterator[None]:
    """Raise StoreUnavailableError for what the client raises."""
    try:
        yield
    except (RedisError, RedisClusterException, OSError) as error:
        raise StoreUnavailableError(
            f"the store does not answer for limits and usage: {error}"
        ) from error


class Breaker:
    """Once a call has failed, lets one call a second try, and the others go without."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._away_until: float | None = None

    async def call(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T | None:
        """What the call returns; None while the store is away."""
        if self._away_until is not None:
            if self._clock() < self._away_until:
                return None
            self._away_until = self._clock() + _AGAIN_SECONDS
        try:
            answer = await call()
        except StoreUnavailableError as error:
            if self._away_until is None:
                logger.warning("limits are counted on this server alone for now: %s", error)
            self._away_until = self._clock() + _AGAIN_SECONDS
            return None
        if self._away_until is not None:
            self._away_until = None
            logger.info("limits are counted for all servers again")
        return answer
