"""The cache against a model of it, one step at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import hypothesis.strategies as st
import pytest
import pytest_asyncio
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from prefix_store.cache import PrefixCache, SilentObserver
from prefix_store.errors import CacheFullError, PrefixTooLargeError

BUDGET = 48
ROOM_SECONDS = 10.0
SIZES = {"a": 8, "b": 16, "c": 24, "d": 40, "e": 48}
VERSIONS = st.sampled_from(sorted(SIZES))


def size_of(versions: set[str]) -> int:
    return sum(SIZES[version] for version in versions)


class LoadError(Exception):
    pass


class Loader:
    """Loads when told to; checks that nothing is loaded twice, dropped unloaded, or over budget."""

    def __init__(self) -> None:
        self.under_way: dict[str, asyncio.Future[None]] = {}
        self.loaded: set[str] = set()

    async def load(self, version: str, nbytes: int) -> str:
        assert nbytes == SIZES[version]
        assert version not in self.under_way
        assert version not in self.loaded
        self.under_way[version] = asyncio.get_running_loop().create_future()
        assert size_of(self.loaded | set(self.under_way)) <= BUDGET
        try:
            await self.under_way[version]
        finally:
            del self.under_way[version]
        self.loaded.add(version)
        return f"value of {version}"

    def drop(self, version: str) -> None:
        self.loaded.remove(version)


class Observed(SilentObserver):
    def __init__(self) -> None:
        self.hits = self.misses = self.evictions = self.loads = 0
        self.now = (0, 0, 0, 0)

    def hit(self) -> None:
        self.hits += 1

    def miss(self) -> None:
        self.misses += 1

    def eviction(self) -> None:
        self.evictions += 1

    def loaded(self, seconds: float) -> None:
        assert seconds >= 0
        self.loads += 1

    def occupied(self, nbytes: int, pinned: int, prefixes: int, waiting: int) -> None:
        self.now = (nbytes, pinned, prefixes, waiting)


class Holder:
    """One lease, held until it is told to let go."""

    def __init__(self, cache: PrefixCache[str], version: str) -> None:
        self.version = version
        self.let_go = asyncio.Event()
        self.held = False
        self.task = asyncio.create_task(self._hold(cache))

    async def _hold(self, cache: PrefixCache[str]) -> None:
        async with cache.lease(self.version, SIZES[self.version]) as value:
            assert value == f"value of {self.version}"
            self.held = True
            await self.let_go.wait()


class Pinner:
    """One pin on its way or in place."""

    def __init__(self, cache: PrefixCache[str], version: str) -> None:
        self.version = version
        self.task = asyncio.create_task(cache.pin(version, SIZES[version]))

    @property
    def held(self) -> bool:
        return self.task.done()


class CacheMachine(RuleBasedStateMachine):
    """The model: who waits in which order, what is loading, what is loaded, when it was used."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.now = 0.0
        self.loop.time = lambda: self.now  # type: ignore[method-assign]
        self.loader, self.observed, self.expected = Loader(), Observed(), Observed()
        self.cache = PrefixCache(
            self.loader.load,
            self.loader.drop,
            max_bytes=BUDGET,
            room_seconds=ROOM_SECONDS,
            observer=self.observed,
        )
        self.holders: list[Holder] = []
        self.pinners: dict[str, Pinner] = {}
        self.queue: list[str] = []
        self.loading: set[str] = set()
        self.ready: set[str] = set()
        self.last_used: dict[str, int] = {}
        self.clock = 0

    def teardown(self) -> None:
        for holder in self.holders:
            holder.task.cancel()
        for pinner in self.pinners.values():
            pinner.task.cancel()
        self._settle()
        self.loop.run_until_complete(self.cache.close())
        self.loop.close()
        assert not self.loader.loaded
        assert not self.loader.under_way
        assert self.observed.now == (0, 0, 0, 0)

    def _settle(self) -> None:
        async def turns() -> None:
            for _ in range(20):  # more than any chain of callbacks here is long
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())

    def _run(self, start: type[Any], version: str) -> Any:
        async def on_loop() -> Any:
            return start(self.cache, version)

        started = self.loop.run_until_complete(on_loop())
        self._settle()
        return started

    def _in_use(self) -> set[str]:
        return {holder.version for holder in self.holders} | set(self.pinners)

    def _use(self, version: str) -> None:
        self.clock += 1
        self.last_used[version] = self.clock

    def _pinned_bytes(self) -> int:
        return size_of({version for version, pinner in self.pinners.items() if pinner.held})

    def _refused(self, version: str) -> bool:
        known = version in self.ready | self.loading or version in self.queue
        return not known and SIZES[version] > BUDGET - self._pinned_bytes()

    def _want(self, version: str) -> None:
        if version in self.ready:
            self.expected.hits += 1
            return
        self.expected.misses += 1
        if version not in self.loading and version not in self.queue:
            self.queue.append(version)

    def _give_room(self) -> None:
        while self.queue:
            first = self.queue[0]
            kept = (self.ready & self._in_use()) | self.loading | {first}
            if size_of(kept) > BUDGET:
                return
            for version in sorted(self.ready - kept, key=self.last_used.__getitem__):
                if size_of(self.ready | kept) > BUDGET:
                    self.ready.remove(version)
                    self.expected.evictions += 1
            self.loading.add(self.queue.pop(0))

    def _fail(self, versions: set[str], error: type[Exception]) -> None:
        waited = [holder for holder in self.holders if holder.version in versions]
        pinning = [self.pinners[version] for version in versions & set(self.pinners)]
        assert all(isinstance(waiter.task.exception(), error) for waiter in (*waited, *pinning))
        self.holders = [holder for holder in self.holders if holder not in waited]
        for pinner in pinning:
            del self.pinners[pinner.version]

    @rule(version=VERSIONS)
    def lease(self, version: str) -> None:
        if self._refused(version):
            holder = self._run(Holder, version)
            assert isinstance(holder.task.exception(), CacheFullError)
            return
        self._want(version)
        self.holders.append(self._run(Holder, version))
        self._give_room()

    @precondition(lambda self: all(pinner.held for pinner in self.pinners.values()))
    @rule(version=VERSIONS)
    def pin(self, version: str) -> None:
        if version in self.pinners:
            return
        pinner = self._run(Pinner, version)
        if SIZES[version] > BUDGET - self._pinned_bytes():
            assert isinstance(pinner.task.exception(), CacheFullError)
            return
        self._want(version)
        self.pinners[version] = pinner
        self._give_room()

    @precondition(lambda self: any(pinner.held for pinner in self.pinners.values()))
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        held = sorted(version for version, pinner in self.pinners.items() if pinner.held)
        version = data.draw(st.sampled_from(held))
        self.cache.unpin(version)
        self._settle()
        del self.pinners[version]
        self._use(version)
        self._give_room()

    @precondition(lambda self: self.loader.under_way)
    @rule(data=st.data())
    def load_succeeds(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(sorted(self.loader.under_way)))
        self.loader.under_way[version].set_result(None)
        self._settle()
        self.loading.remove(version)
        self.ready.add(version)
        self._use(version)
        self.expected.loads += 1
        self._give_room()

    @precondition(lambda self: self.loader.under_way)
    @rule(data=st.data())
    def load_fails(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(sorted(self.loader.under_way)))
        self.loader.under_way[version].set_exception(LoadError(version))
        self._settle()
        self.loading.remove(version)
        self._fail({version}, LoadError)
        self._give_room()

    @precondition(lambda self: self.queue)
    @rule()
    def room_does_not_come(self) -> None:
        self.now += ROOM_SECONDS + 1
        self._settle()
        self._fail(set(self.queue), CacheFullError)
        self.queue.clear()

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), cancelled=st.booleans())
    def lease_ends(self, data: st.DataObject, *, cancelled: bool) -> None:
        holder = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        if cancelled or not holder.held:
            holder.task.cancel()
        else:
            holder.let_go.set()
        self._settle()
        assert holder.task.done()
        if holder.version in self.queue and holder.version not in self._in_use():
            self.queue.remove(holder.version)
        self._use(holder.version)
        self._give_room()

    @invariant()
    def is_as_the_model_says(self) -> None:
        assert self.loader.loaded == self.ready
        assert set(self.loader.under_way) == self.loading
        waiters = (*self.holders, *self.pinners.values())
        assert all(waiter.held == (waiter.version in self.ready) for waiter in waiters)
        used = self.ready | self.loading
        self.expected.now = (size_of(used), self._pinned_bytes(), len(used), len(self.queue))
        assert vars(self.observed) == vars(self.expected)

    @invariant()
    def budget_holds_and_nobody_waits_without_need(self) -> None:
        assert size_of(self.loader.loaded | set(self.loader.under_way)) <= BUDGET
        if self.queue:
            busy = (self.loader.loaded & self._in_use()) | set(self.loader.under_way)
            assert size_of(busy) + SIZES[self.queue[0]] > BUDGET


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


@pytest.fixture
def loader() -> Loader:
    return Loader()


@pytest_asyncio.fixture
async def cache(loader: Loader) -> AsyncIterator[PrefixCache[str]]:
    cache = PrefixCache(loader.load, loader.drop, max_bytes=BUDGET, room_seconds=ROOM_SECONDS)
    yield cache
    await cache.close()


async def until_loading(loader: Loader, version: str) -> None:
    while version not in loader.under_way:
        await asyncio.sleep(0)


async def test_what_can_never_fit_is_refused(cache: PrefixCache[str], loader: Loader) -> None:
    attempts: list[Coroutine[Any, Any, Any]] = [
        cache.lease("large", BUDGET + 1).__aenter__(),
        cache.pin("large", BUDGET + 1),
    ]
    for attempt in attempts:
        with pytest.raises(PrefixTooLargeError, match=rf"{BUDGET + 1} bytes .* {BUDGET}"):
            await attempt
    assert not loader.under_way


async def test_the_end_of_a_lease_wakes_who_waits(cache: PrefixCache[str], loader: Loader) -> None:
    first, second = Holder(cache, "d"), Holder(cache, "c")
    await until_loading(loader, "d")
    loader.under_way["d"].set_result(None)
    first.let_go.set()
    await first.task

    await until_loading(loader, "c")
    loader.under_way["c"].set_result(None)
    second.let_go.set()
    await second.task
    assert loader.loaded == {"c"}


async def test_a_touched_version_stays_longer(cache: PrefixCache[str], loader: Loader) -> None:
    for version in ("a", "b", "c"):
        holder = Holder(cache, version)
        await until_loading(loader, version)
        loader.under_way[version].set_result(None)
        holder.let_go.set()
        await holder.task
        cache.touch("a")

    assert loader.loaded == {"a", "b", "c"}
    holder = Holder(cache, "d")
    await until_loading(loader, "d")
    assert loader.loaded == {"a"}
    holder.task.cancel()


async def test_close_stops_a_load_and_a_wait_under_way(loader: Loader) -> None:
    cache = PrefixCache(loader.load, loader.drop, max_bytes=BUDGET, room_seconds=ROOM_SECONDS)
    holders = [Holder(cache, version) for version in ("d", "e", "c")]
    await until_loading(loader, "d")

    await cache.close()

    for holder in holders:
        with pytest.raises(asyncio.CancelledError):
            await holder.task
    assert not loader.under_way
