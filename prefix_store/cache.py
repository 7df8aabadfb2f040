"""Prefixes kept ready for use, within a budget of bytes."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Protocol

from prefix_store.prefix import Prefix


class CacheObserver(Protocol):
    """Told what the cache does; called on the event loop, must be quick and must not raise."""

    def hit(self) -> None:
        """A lease found its prefix loaded."""

    def miss(self) -> None:
        """A lease waits for a load, its own or one under way."""

    def eviction(self) -> None:
        """A prefix was dropped to keep the budget."""

    def loaded(self, seconds: float) -> None:
        """A load succeeded after so many seconds."""

    def resident(self, nbytes: int, prefixes: int) -> None:
        """So many bytes in so many prefixes are loaded now."""


class _Silent:
    def hit(self) -> None: ...
    def miss(self) -> None: ...
    def eviction(self) -> None: ...
    def loaded(self, seconds: float) -> None: ...
    def resident(self, nbytes: int, prefixes: int) -> None: ...


class _Entry:
    """A version on its way (`nbytes` None) or loaded, and how many leases hold it."""

    def __init__(self, loading: asyncio.Task[Prefix]) -> None:
        self.loading = loading
        self.nbytes: int | None = None
        self.leases = 0


class PrefixCache:
    """Loads each version once however many wait, and drops the least recently used.

    A version under lease is never dropped, so the budget is exceeded while leases alone do so. A
    prefix larger than the whole budget displaces nothing and is dropped after its last lease.
    Use from one event loop; close it at the end.
    """

    def __init__(
        self,
        load: Callable[[str], Awaitable[Prefix]],
        drop: Callable[[str], None],
        max_bytes: int,
        observer: CacheObserver | None = None,
    ) -> None:
        """
        Args:
            load: makes a version ready for use; what it raises, every waiting lease raises.
            drop: undoes `load`; must not raise.
            max_bytes: budget for the tensors of all loaded prefixes.
        """
        self._load = load
        self._drop = drop
        self._max_bytes = max_bytes
        self._observer = observer or _Silent()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._resident = 0  # bytes of everything loaded
        self._budgeted = 0  # the same without oversized prefixes

    @asynccontextmanager
    async def lease(self, version: str) -> AsyncIterator[Prefix]:
        """The prefix of `version`, loaded if need be, and kept until the context ends.

        Raises:
            whatever `load` raises; nothing is kept then and the next lease tries again.
        """
        entry = self._entries.get(version)
        if entry is None:
            entry = self._entries[version] = _Entry(asyncio.create_task(self._loaded(version)))
        if entry.nbytes is None:
            self._observer.miss()
        else:
            self._observer.hit()
        entry.leases += 1
        try:
            # Shielded: a waiter that is cancelled must not take the load from the others.
            yield await asyncio.shield(entry.loading)
        finally:
            entry.leases -= 1
            if self._entries.get(version) is entry:  # not when its load failed
                self._entries.move_to_end(version)
            self._shrink()

    async def close(self) -> None:
        """Stop loads under way and drop everything loaded; call when no lease is held."""
        loading = [entry.loading for entry in self._entries.values() if entry.nbytes is None]
        for task in loading:
            task.cancel()
        await asyncio.gather(*loading, return_exceptions=True)
        loaded = [version for version, entry in self._entries.items() if entry.nbytes is not None]
        self._entries.clear()
        for version in loaded:
            self._drop(version)
        self._recount()

    async def _loaded(self, version: str) -> Prefix:
        started = time.perf_counter()
        try:
            prefix = await self._load(version)
        except BaseException:
            del self._entries[version]
            raise
        self._observer.loaded(time.perf_counter() - started)
        self._entries[version].nbytes = prefix.nbytes
        self._recount()
        self._shrink()
        return prefix

    def _shrink(self) -> None:
        """Drop idle prefixes: the oversized, and the least recently used while over budget."""
        if self._resident <= self._max_bytes:
            return
        for version, entry in list(self._entries.items()):
            if entry.nbytes is None or entry.leases:
                continue
            if entry.nbytes > self._max_bytes or self._budgeted > self._max_bytes:
                del self._entries[version]
                self._drop(version)
                self._observer.eviction()
                self._recount()

    def _recount(self) -> None:
        sizes = [entry.nbytes for entry in self._entries.values() if entry.nbytes is not None]
        self._resident = sum(sizes)
        self._budgeted = sum(size for size in sizes if size <= self._max_bytes)
        self._observer.resident(self._resident, len(sizes))
