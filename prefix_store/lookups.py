"""Look a name up once, however many ask, and remember what was found and what was not."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from prefix_store.ending import end
from prefix_store.errors import PrefixStoreError, StoreUnavailableError

MAX_KNOWN = 20_000
MAX_UNKNOWN = 20_000

T = TypeVar("T")
V = TypeVar("V")


class Lookups(Generic[T]):
    """What names stand for in the store, as long as nobody says that it changed.

    What is known is answered while the store is away, too; that a name is unknown is not. Both are
    bounded: what was not asked for longest is forgotten. Use from one event loop; close it.
    """

    def __init__(
        self,
        look_up: Callable[[str], Awaitable[T]],
        missing: type[PrefixStoreError],
        *,
        is_connected: Callable[[], bool],
        seconds: float,
    ) -> None:
        """
        Args:
            look_up: asks the store; raises `missing` for a name it does not have.
            is_connected: whether what is remembered is kept current.
            seconds: most seconds that looking up one name may take.
        """
        self._ask = look_up
        self._missing = missing
        self._is_connected = is_connected
        self._seconds = seconds
        self._known: OrderedDict[str, T] = OrderedDict()  # least recently used first
        self._unknown: OrderedDict[str, PrefixStoreError] = OrderedDict()
        self._lookups: dict[str, asyncio.Task[T]] = {}
        self._running: set[asyncio.Task[T]] = set()

    def __len__(self) -> int:
        """How many names are known."""
        return len(self._known)

    async def close(self) -> None:
        """Stop look-ups under way."""
        await end(*self._running)

    async def get(self, name: str) -> T:
        """What the name stands for.

        Raises:
            `missing`: nothing.
            StoreUnavailableError: the store is away and the name is not known here.
        """
        if name in self._known:
            self._known.move_to_end(name)
            return self._known[name]
        if self._is_connected() and name in self._unknown:
            self._unknown.move_to_end(name)
            raise self._unknown[name].with_traceback(None)
        # Shielded: a request that is cancelled must not take the look-up from the others.
        return await asyncio.shield(self._lookups.get(name) or self._look_up(name))

    def forget(self, name: str) -> None:
        """Look the name up again the next time; what is being looked up is not remembered."""
        self._known.pop(name, None)
        self._unknown.pop(name, None)
        self._lookups.pop(name, None)

    def forget_all(self) -> None:
        """The same for every name."""
        self._known.clear()
        self._unknown.clear()
        self._lookups.clear()

    def _look_up(self, name: str) -> asyncio.Task[T]:
        running = self._lookups[name] = asyncio.create_task(self._fetch(name))
        self._running.add(running)
        running.add_done_callback(self._looked_up)
        return running

    def _looked_up(self, running: asyncio.Task[T]) -> None:
        self._running.discard(running)
        if not running.cancelled():
            running.exception()  # taken here in case every request that waits was cancelled

    async def _fetch(self, name: str) -> T:
        try:
            async with asyncio.timeout(self._seconds):
                found = await self._ask(name)
        except self._missing as error:
            if self._is_current(name):
                _remember(self._unknown, name, error, MAX_UNKNOWN)
            raise
        except TimeoutError as error:
            raise StoreUnavailableError("the prefix store does not answer in time") from error
        else:
            if self._is_current(name):
                _remember(self._known, name, found, MAX_KNOWN)
            return found
        finally:
            if self._is_current(name):
                del self._lookups[name]

    def _is_current(self, name: str) -> bool:
        """Whether the look-up that runs was not overtaken by a change."""
        return self._lookups.get(name) is asyncio.current_task()


def _remember(known: OrderedDict[str, V], name: str, value: V, most: int) -> None:
    known[name] = value
    if len(known) > most:
        known.popitem(last=False)
