"""Counting in Redis and without it: leases that end by themselves, and going on alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio
from redis.asyncio import Redis

from prefix_store.embedded import EmbeddedValkey
from prefix_store.redis_store.connecting import connect
from server.accounting.counters import LEASE_SECONDS, Charge, LocalCounters, Meter, Refused
from server.accounting.counting import Charged, Counting
from server.accounting.reaching import Breaker
from server.accounting.redis_counters import RedisCounters

DEADLINE_SECONDS = 30
REQUESTS = Meter("acme", "tenant", "requests")
TOKENS = Meter("acme", "tenant", "tokens")
RUNNING = Meter("acme", "tenant", "running")


class Clock:
    """Milliseconds that pass when told."""

    def __init__(self) -> None:
        self.ms = 1_700_000_000_000

    def __call__(self) -> int:
        return self.ms

    def seconds(self) -> float:
        return self.ms / 1000


def counting(redis: Redis, clock: Clock, **options: float) -> Counting:
    """One server's."""
    return Counting(
        RedisCounters(redis, clock),
        Breaker(clock.seconds),
        local=LocalCounters(clock),
        **options,
    )


@pytest_asyncio.fixture
async def outage(tmp_path: Path) -> AsyncIterator[tuple[EmbeddedValkey, Redis]]:
    """A Valkey to stop, and a client as the server has one."""
    valkey = EmbeddedValkey(tmp_path)
    await valkey.start()
    connected = connect(valkey.url, 1.0, retries=1)
    yield valkey, connected.client
    await connected.close()
    await valkey.stop()


def one(meter: Meter, limit: int, cost: int = 1) -> list[Charge]:
    return [Charge(meter, limit, cost)]


async def test_what_a_killed_server_held_is_free_after_its_time(redis: Redis) -> None:
    clock = Clock()
    killed, other = counting(redis, clock), counting(redis, clock)
    assert isinstance(await killed.take(one(RUNNING, 1), ["a"]), Charged)
    clock.ms += LEASE_SECONDS * 1000 - 1
    assert isinstance(await other.take(one(RUNNING, 1), ["b"]), Refused)
    clock.ms += 1
    assert isinstance(await other.take(one(RUNNING, 1), ["b"]), Charged)


async def test_what_a_server_holds_is_renewed_while_it_runs(redis: Redis) -> None:
    clock = Clock()
    running, other = counting(redis, clock, renew_seconds=0.001), counting(redis, clock)
    charged = await running.take(one(RUNNING, 1), ["a"])
    assert isinstance(charged, Charged)
    await running.start()
    key = "prefixserve.limits:{acme}:tenant:running"
    for _ in range(3):  # three times its time
        clock.ms += LEASE_SECONDS * 1000 - 1
        async with asyncio.timeout(DEADLINE_SECONDS):
            while await redis.zscore(key, "a") != clock.ms + LEASE_SECONDS * 1000:
                await asyncio.sleep(0)
    assert isinstance(await other.take(one(RUNNING, 1), ["b"]), Refused)
    await running.release(charged, [RUNNING], "a")
    assert isinstance(await other.take(one(RUNNING, 1), ["b"]), Charged)
    await running.close()
    assert await redis.zrange(key, 0, -1) == [b"b"]


async def test_without_redis_each_server_counts_on_from_what_it_knows(
    outage: tuple[EmbeddedValkey, Redis],
) -> None:
    valkey, redis = outage
    clock = Clock()
    first, second = counting(redis, clock), counting(redis, clock)
    assert isinstance(await first.take(one(REQUESTS, 3)), Charged)
    assert isinstance(await second.take(one(REQUESTS, 3)), Charged)
    await valkey.stop()
    for _ in range(2):  # beside its own one; the other's is not known here
        charged = await first.take(one(REQUESTS, 3))
        assert isinstance(charged, Charged)
        assert charged.remote is None
    refused = await first.take(one(REQUESTS, 3))
    assert isinstance(refused, Refused)
    assert refused.retry_ms > 60_000
    await valkey.start()
    clock.ms += 1000
    charged = await second.take(one(REQUESTS, 3))
    assert isinstance(charged, Charged)
    assert charged.remote is not None
    assert charged.standings[0].used == 3


async def test_places_taken_without_redis_are_given_back_without_it(
    outage: tuple[EmbeddedValkey, Redis],
) -> None:
    valkey, redis = outage
    alone = counting(redis, Clock())
    await valkey.stop()
    held = await alone.take([*one(RUNNING, 1), *one(TOKENS, 100, 60)], ["a"])
    assert isinstance(held, Charged)
    assert isinstance(await alone.take(one(RUNNING, 1), ["b"]), Refused)
    assert isinstance(await alone.take(one(TOKENS, 100, 60)), Refused)
    await alone.release(held, [RUNNING], "a")
    await alone.settle(held, [TOKENS], -20)
    assert isinstance(await alone.take([*one(RUNNING, 1), *one(TOKENS, 100, 60)], ["b"]), Charged)
    await alone.close()


async def test_nothing_is_kept_for_ever(redis: Redis) -> None:
    clock = Clock()
    server = counting(redis, clock)
    await server.take([*one(REQUESTS, 5), *one(TOKENS, 5), *one(RUNNING, 5)], ["a"])
    keys = await redis.keys("prefixserve.limits:*")
    assert len(keys) == 3
    assert all([await redis.ttl(key) > 0 for key in keys])
