"""How a request's tokens reach whoever reads them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Self

from server.engine.protocol import EngineFailedError, StreamEvent


class EventStream:
    """The tokens of one request, as they are generated."""

    def __init__(self, cancel: Callable[[], None]) -> None:
        """
        Args:
            cancel: has the engine drop the request.
        """
        self._cancel = cancel
        self._events: asyncio.Queue[StreamEvent | EngineFailedError] = asyncio.Queue()
        self._ended = False

    def push(self, event: StreamEvent | EngineFailedError) -> None:
        """Add what the engine sent."""
        self._events.put_nowait(event)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StreamEvent:
        if self._ended:
            raise StopAsyncIteration
        event = await self._events.get()
        if isinstance(event, EngineFailedError):
            self._ended = True
            raise event
        self._ended = event.finish_reason is not None
        return event

    async def aclose(self) -> None:
        """Cancel the request if it has not ended."""
        if not self._ended:
            self._ended = True
            self._cancel()
