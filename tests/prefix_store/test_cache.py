"""The cache against a model of it, one step at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import hypothesis.strategies as st
import pytest
import pytest_asyncio
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from prefix_store.cache import PrefixCache
from prefix_store.prefix import Prefix

BUDGET = 48
SIZES = {"a": 8, "b": 16, "c": 24, "d": 40, "oversized": 80}
FITTING = {version for version, size in SIZES.items() if size <= BUDGET}


def size_of(versions: set[str]) -> int:
    return sum(SIZES[version] for version in versions)


class LoadError(Exception):
    pass


class Loader:
    """Loads when told to; checks that nothing is loaded twice or dropped unloaded."""

    def __init__(self) -> None:
        self.under_way: dict[str, asyncio.Future[None]] = {}
        self.loaded: set[str] = set()

    async def load(self, version: str) -> Prefix:
        assert version not in self.under_way
        assert version not in self.loaded
        self.under_way[version] = asyncio.get_running_loop().create_future()
        try:
            await self.under_way[version]
        finally:
            del self.under_way[version]
        self.loaded.add(version)
        half = torch.zeros(1, 1, SIZES[version] // 4, 1, dtype=torch.float16)
        return Prefix(half, half, method=version)

    def drop(self, version: str) -> None:
        self.loaded.remove(version)


class Observed:
    def __init__(self) -> None:
        self.hits = self.misses = self.evictions = self.loads = 0
        self.now = (0, 0)

    def hit(self) -> None:
        self.hits += 1

    def miss(self) -> None:
        self.misses += 1

    def eviction(self) -> None:
        self.evictions += 1

    def loaded(self, seconds: float) -> None:
        assert seconds >= 0
        self.loads += 1

    def resident(self, nbytes: int, prefixes: int) -> None:
        self.now = (nbytes, prefixes)


class Holder:
    """One lease, held until it is told to let go."""

    def __init__(self, cache: PrefixCache, version: str) -> None:
        self.version = version
        self.let_go = asyncio.Event()
        self.held = False
        self.task = asyncio.create_task(self._hold(cache))

    async def _hold(self, cache: PrefixCache) -> None:
        async with cache.lease(self.version) as prefix:
            assert prefix.method == self.version
            self.held = True
            await self.let_go.wait()


class CacheMachine(RuleBasedStateMachine):
    """The model is a dict: version -> when it was last used, for each version in the cache."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.loader, self.observed = Loader(), Observed()
        self.cache = PrefixCache(self.loader.load, self.loader.drop, BUDGET, self.observed)
        self.holders: list[Holder] = []
        self.clock = 0
        self.last_used: dict[str, int] = {}
        self.ready: set[str] = set()
        self.expected = Observed()

    def teardown(self) -> None:
        for holder in self.holders:
            holder.task.cancel()
        self._settle()
        self.loop.run_until_complete(self.cache.close())
        self.loop.close()
        assert not self.loader.loaded
        assert not self.loader.under_way
        assert self.observed.now == (0, 0)

    def _settle(self) -> None:
        async def turns() -> None:
            for _ in range(10):  # more than any chain of callbacks here is long
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())

    def _use(self, version: str) -> None:
        self.clock += 1
        self.last_used[version] = self.clock

    def _leased(self) -> set[str]:
        return {holder.version for holder in self.holders}

    def _drop(self, version: str) -> None:
        self.ready.remove(version)
        del self.last_used[version]
        self.expected.evictions += 1

    def _shrink_model(self) -> None:
        idle = sorted(self.ready - self._leased(), key=self.last_used.__getitem__)
        for version in idle:
            if version not in FITTING or size_of(self.ready & FITTING) > BUDGET:
                self._drop(version)

    @rule(version=st.sampled_from(sorted(SIZES)))
    def lease(self, version: str) -> None:
        if version in self.ready:
            self.expected.hits += 1
        else:
            self.expected.misses += 1
        if version not in self.last_used:
            self._use(version)

        async def start() -> Holder:
            return Holder(self.cache, version)

        self.holders.append(self.loop.run_until_complete(start()))
        self._settle()

    @precondition(lambda self: self.loader.under_way)
    @rule(data=st.data())
    def load_succeeds(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(sorted(self.loader.under_way)))
        self.loader.under_way[version].set_result(None)
        self._settle()
        self.ready.add(version)
        self.expected.loads += 1
        self._shrink_model()

    @precondition(lambda self: self.loader.under_way)
    @rule(data=st.data())
    def load_fails(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(sorted(self.loader.under_way)))
        self.loader.under_way[version].set_exception(LoadError(version))
        self._settle()
        waited = [holder for holder in self.holders if holder.version == version]
        assert all(isinstance(holder.task.exception(), LoadError) for holder in waited)
        self.holders = [holder for holder in self.holders if holder not in waited]
        del self.last_used[version]

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
        self._use(holder.version)
        self._shrink_model()

    @invariant()
    def is_as_the_model_says(self) -> None:
        assert self.loader.loaded == self.ready
        assert set(self.loader.under_way) == set(self.last_used) - self.ready
        assert all(holder.held == (holder.version in self.ready) for holder in self.holders)
        self.expected.now = (size_of(self.ready), len(self.ready))
        assert vars(self.observed) == vars(self.expected)

    @invariant()
    def budget_holds_but_for_leases(self) -> None:
        assert all(holder.version in self.loader.loaded for holder in self.holders if holder.held)
        if size_of(self.loader.loaded & FITTING) > BUDGET:
            assert self.loader.loaded <= self._leased()


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


@pytest.fixture
def loader() -> Loader:
    return Loader()


@pytest_asyncio.fixture
async def cache(loader: Loader) -> AsyncIterator[PrefixCache]:
    cache = PrefixCache(loader.load, loader.drop, BUDGET)
    yield cache
    await cache.close()


async def test_an_oversized_prefix_displaces_nothing(cache: PrefixCache, loader: Loader) -> None:
    for version in ("a", "oversized"):
        holder = Holder(cache, version)
        while version not in loader.under_way:
            await asyncio.sleep(0)
        loader.under_way[version].set_result(None)
        holder.let_go.set()
        await holder.task

    assert loader.loaded == {"a"}


async def test_close_stops_a_load_under_way(loader: Loader) -> None:
    cache = PrefixCache(loader.load, loader.drop, BUDGET)
    holder = Holder(cache, "a")
    while not loader.under_way:
        await asyncio.sleep(0)

    await cache.close()

    with pytest.raises(asyncio.CancelledError):
        await holder.task
    assert not loader.under_way
