"""Prefixes kept ready for use, within a budget of bytes that no load can exceed."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Generic, Protocol, TypeVar

from prefix_store.errors import CacheFullError, PrefixTooLargeError

T = TypeVar("T")


class CacheObserver(Protocol):
    """Told what a cache does; called on the event loop, must be quick and must not raise."""

    def hit(self) -> None:
        """A lease found its prefix loaded."""

    def miss(self) -> None:
        """A lease waits for a load, its own or one under way."""

    def eviction(self) -> None:
        """A prefix was dropped to make room."""

    def loaded(self, seconds: float) -> None:
        """A load succeeded after so many seconds, the wait for room not counted."""

    def occupied(self, nbytes: int, pinned: int, prefixes: int, waiting: int) -> None:
        """So many bytes, and so many of them pinned, in so many prefixes are loaded or loading; so
        many more wait for room."""


class SilentObserver:
    """A `CacheObserver` that does nothing."""

    def hit(self) -> None:
        """Nothing."""

    def miss(self) -> None:
        """Nothing."""

    def eviction(self) -> None:
        """Nothing."""

    def loaded(self, seconds: float) -> None:
        """Nothing."""

    def occupied(self, nbytes: int, pinned: int, prefixes: int, waiting: int) -> None:
        """Nothing."""


class _Entry(Generic[T]):
    """A version that waits for room, loads, or is loaded; and how many leases hold it."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.room: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.loading: asyncio.Task[T]
        self.has_room = False
        self.leases = 0


class PrefixCache(Generic[T]):
    """Loads each version once however many wait for it; drops the least recently used for room.

    The bytes of everything loaded or loading never exceed the budget. A version under lease is
    never dropped: when leases leave too little room, a new version waits for some to end, first
    come, first served. A pinned version stays. Use from one event loop; close it at the end.
    """

    def __init__(
        self,
        load: Callable[[str, int], Awaitable[T]],
        drop: Callable[[str], None],
        *,
        max_bytes: int,
        room_seconds: float,
        observer: CacheObserver | None = None,
    ) -> None:
        """
        Args:
            load: makes a version of so many bytes ready, in no more than these; what it raises,
                every waiting lease raises.
            drop: undoes `load`; must not raise.
            max_bytes: the budget.
            room_seconds: how long a version may wait for room.
        """
        self._load = load
        self._drop = drop
        self._max_bytes = max_bytes
        self._room_seconds = room_seconds
        self._observer = observer or SilentObserver()
        self._entries: dict[str, _Entry[T]] = {}
        self._idle: OrderedDict[str, int] = OrderedDict()  # loaded, no lease; oldest use first
        self._queue: deque[_Entry[T]] = deque()  # those that wait for room
        self._tasks: set[asyncio.Task[T]] = set()
        self._pinned: dict[str, int] = {}
        self._used_bytes = 0
        self._idle_bytes = 0
        self._pinned_bytes = 0

    @property
    def max_bytes(self) -> int:
        """The budget."""
        return self._max_bytes

    @property
    def pinned(self) -> frozenset[str]:
        """What is pinned now."""
        return frozenset(self._pinned)

    def check_fits(self, nbytes: int) -> None:
        """Refuse what could never be loaded.

        Raises:
            PrefixTooLargeError: more bytes than the whole budget.
        """
        if nbytes > self._max_bytes:
            raise PrefixTooLargeError(
                f"the prefix takes {nbytes} bytes of memory and this server has {self._max_bytes} "
                "for prefixes; use a shorter prefix, or ask its operator for more"
            )

    @asynccontextmanager
    async def lease(self, version: str, nbytes: int) -> AsyncIterator[T]:
        """What `load` made of `version`, kept until the context ends.

        Args:
            nbytes: memory that it takes once loaded.

        Raises:
            PrefixTooLargeError: it can never fit.
            CacheFullError: no room came free in time.
            whatever `load` raises; nothing is kept then and the next lease tries again.
        """
        entry = self._acquire(version, nbytes)
        try:
            # Shielded: a waiter that is cancelled must not take the load from the others.
            yield await asyncio.shield(entry.loading)
        finally:
            self._release(version, entry)

    def touch(self, version: str) -> None:
        """Count as a use of `version`, if it is loaded."""
        if version in self._idle:
            self._idle.move_to_end(version)

    async def pin(self, version: str, nbytes: int) -> None:
        """Load a version if need be and keep it until `unpin`; one call at a time.

        Raises:
            PrefixTooLargeError, CacheFullError: no room beside what is pinned and in use.
            whatever `load` raises; it is not pinned then.
        """
        if version in self._pinned:
            return
        self._check_beside_pins(nbytes)
        entry = self._acquire(version, nbytes)
        try:
            await asyncio.shield(entry.loading)
        except BaseException:
            self._release(version, entry)
            raise
        self._pinned[version] = nbytes
        self._pinned_bytes += nbytes
        self._report()

    def unpin(self, version: str) -> None:
        """Undo `pin`; a version that is not pinned is ignored."""
        if version in self._pinned:
            self._pinned_bytes -= self._pinned.pop(version)
            self._release(version, self._entries[version])
            self._report()

    async def close(self) -> None:
        """Stop loads under way and drop everything loaded; call when no lease is held."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for version in self._entries:
            self._drop(version)
        self._entries.clear()
        self._idle.clear()
        self._pinned.clear()
        self._used_bytes = self._idle_bytes = self._pinned_bytes = 0
        self._report()

    def _acquire(self, version: str, nbytes: int) -> _Entry[T]:
        entry = self._entries.get(version)
        if entry is None:
            self._check_beside_pins(nbytes)
            entry = self._start(version, nbytes)
        loaded = entry.loading.done()
        (self._observer.hit if loaded else self._observer.miss)()
        if self._idle.pop(version, None) is not None:
            self._idle_bytes -= entry.nbytes
        entry.leases += 1
        return entry

    def _release(self, version: str, entry: _Entry[T]) -> None:
        entry.leases -= 1
        if entry.leases or self._entries.get(version) is not entry:
            return
        if entry.loading.done():
            self._rest(version, entry)
        elif not entry.has_room:  # nobody wants it any more
            self._forget(version, entry)
            entry.loading.cancel()

    def _start(self, version: str, nbytes: int) -> _Entry[T]:
        entry = self._entries[version] = _Entry[T](nbytes)
        self._queue.append(entry)
        entry.loading = asyncio.create_task(self._loaded(version, entry))
        self._tasks.add(entry.loading)
        entry.loading.add_done_callback(self._ended)
        self._give_room()
        return entry

    def _ended(self, task: asyncio.Task[T]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # those who still wait raise it; asyncio need not report it

    async def _loaded(self, version: str, entry: _Entry[T]) -> T:
        try:
            await self._room(entry)
            started = time.perf_counter()
            value = await self._load(version, entry.nbytes)
        except BaseException:
            self._forget(version, entry)
            raise
        self._observer.loaded(time.perf_counter() - started)
        if not entry.leases:  # everyone who waited has gone
            self._rest(version, entry)
        return value

    async def _room(self, entry: _Entry[T]) -> None:
        try:
            async with asyncio.timeout(self._room_seconds):
                await entry.room
        except TimeoutError as error:
            raise CacheFullError(
                f"the prefix takes {entry.nbytes} bytes; of the {self._max_bytes} this server has "
                f"for prefixes, running requests and pins did not leave as much within "
                f"{self._room_seconds:g} s; try again"
            ) from error

    def _rest(self, version: str, entry: _Entry[T]) -> None:
        """Keep a loaded version that has no lease, for as long as nobody needs the room."""
        self._idle[version] = entry.nbytes
        self._idle_bytes += entry.nbytes
        self._give_room()

    def _forget(self, version: str, entry: _Entry[T]) -> None:
        """Undo `_start` of a version that is not loaded; calling it again does nothing."""
        if self._entries.get(version) is not entry:
            return
        del self._entries[version]
        if entry.has_room:
            self._used_bytes -= entry.nbytes
        elif entry in self._queue:
            self._queue.remove(entry)
        self._give_room()

    def _give_room(self) -> None:
        """Let waiting versions load, in order, as far as dropping idle ones makes room."""
        while self._queue:
            entry = self._queue[0]
            if entry.room.cancelled():  # its wait is over, and it is about to be forgotten
                self._queue.popleft()
                continue
            if self._used_bytes - self._idle_bytes + entry.nbytes > self._max_bytes:
                break
            while self._used_bytes + entry.nbytes > self._max_bytes:
                self._evict()
            self._used_bytes += entry.nbytes
            entry.has_room = True
            entry.room.set_result(None)
            self._queue.popleft()
        self._report()

    def _evict(self) -> None:
        version, nbytes = self._idle.popitem(last=False)
        del self._entries[version]
        self._idle_bytes -= nbytes
        self._used_bytes -= nbytes
        self._drop(version)
        self._observer.eviction()

    def _check_beside_pins(self, nbytes: int) -> None:
        self.check_fits(nbytes)
        if nbytes > self._max_bytes - self._pinned_bytes:
            raise CacheFullError(
                f"the prefix takes {nbytes} bytes; of the {self._max_bytes} this server has for "
                f"prefixes, {self._pinned_bytes} are pinned; unpin a task, or ask its operator "
                "for more"
            )

    def _report(self) -> None:
        waiting = len(self._queue)
        loaded = len(self._entries) - waiting
        self._observer.occupied(self._used_bytes, self._pinned_bytes, loaded, waiting)
