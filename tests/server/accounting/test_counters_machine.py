"""Limits by a simple model: never more than the limit in any window, on two servers at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis.asyncio import Redis

from prefix_store.embedded import EmbeddedValkey
from server.accounting.counters import (
    LEASE_SECONDS,
    WINDOW_SECONDS,
    Charge,
    LocalCounters,
    Meter,
    Refused,
    Taken,
)
from server.accounting.redis_counters import RedisCounters

START = 1_700_000_000_000
WINDOW_MS = WINDOW_SECONDS * 1000
SLACK_MS = 1000
"""A count holds for less than a second over its minute."""
REQUESTS = Meter("acme", "tenant", "requests")
TOKENS = Meter("acme", "tenant", "tokens")
RUNNING = Meter("acme", "tenant", "running")
MOST = {REQUESTS: 4, TOKENS: 60, RUNNING: 3}
REPLICA = st.integers(0, 1)


@dataclass
class Call:
    """What was let in."""

    at: int
    second: int
    requests: int
    tokens: int
    leases: tuple[str, ...]
    settled: bool = False


class LimiterMachine(RuleBasedStateMachine):
    """The model: every call that was let in, with its time; each lease with its end."""

    run: Callable[[Coroutine[Any, Any, Any]], Any]
    redis: Redis

    def __init__(self) -> None:
        super().__init__()
        self.run(self.redis.flushall())
        self.now = START
        self.replicas = [RedisCounters(self.redis, lambda: self.now) for _ in range(2)]
        self.local = LocalCounters(lambda: self.now)
        self.calls: list[Call] = []
        self.leases: dict[str, int] = {}
        self.refused: tuple[Charge, int] | None = None

    @rule(ms=st.one_of(st.integers(0, 1500), st.integers(1000, 70_000)))
    def wait(self, ms: int) -> None:
        self.now += ms
        self.refused = None

    @rule(replica=REPLICA, tokens=st.integers(1, 40), sequences=st.integers(1, 3))
    def call(self, replica: int, tokens: int, sequences: int) -> None:
        costs = {REQUESTS: 1, TOKENS: tokens, RUNNING: sequences}
        charges = tuple(Charge(meter, MOST[meter], cost) for meter, cost in costs.items())
        leases = tuple(f"{len(self.calls)}.{self.now}.{number}" for number in range(sequences))
        answer = self._take(replica, charges, leases)
        if isinstance(answer, Taken):
            self.refused = None
            self.calls.append(Call(self.now, answer.second, 1, tokens, leases))
            self.leases.update(dict.fromkeys(leases, self.now + LEASE_SECONDS * 1000))
            self._check_never_over()
        else:
            self._check_refusal_is_due(charges, answer)
            charge = charges[answer.index]
            self.refused = (charge, answer.retry_ms) if charge.meter.is_rate else None

    @precondition(lambda self: self.refused is not None)
    @rule(replica=REPLICA)
    def come_back_when_told(self, replica: int) -> None:
        """What a rate refused fits at the time that it told, and not a millisecond before."""
        assert self.refused is not None
        charge, retry_ms = self.refused
        self.now += retry_ms - 1
        assert isinstance(self._take(replica, (charge,)), Refused)
        self.now += 1
        answer = self._take(replica, (charge,))
        assert isinstance(answer, Taken)
        requests = int(charge.meter == REQUESTS)
        self.calls.append(Call(self.now, answer.second, requests, charge.cost * (1 - requests), ()))
        self._check_never_over()
        self.refused = None

    def _take(
        self, replica: int, charges: tuple[Charge, ...], leases: tuple[str, ...] = ()
    ) -> Taken | Refused:
        """The same answer here and in Redis."""
        answer: Taken | Refused = self.run(self.replicas[replica].take(charges, leases))
        assert self.local.take(charges, leases) == answer
        return answer

    @precondition(lambda self: self.calls)
    @rule(replica=REPLICA, data=st.data())
    def settle(self, replica: int, data: st.DataObject) -> None:
        """A call ends, having used less than it held."""
        call = data.draw(st.sampled_from(self.calls))
        if call.settled:
            return
        call.settled = True
        used = data.draw(st.integers(0, call.tokens))
        change = used - call.tokens
        self.run(self.replicas[replica].settle([TOKENS], call.second, change))
        self.local.settle([TOKENS], call.second, change)
        call.tokens = used
        self.refused = None

    @precondition(lambda self: any(one.leases for one in self.calls))
    @rule(replica=REPLICA, data=st.data())
    def release(self, replica: int, data: st.DataObject) -> None:
        leases = data.draw(st.sampled_from([one for one in self.calls if one.leases])).leases
        self.run(self.replicas[replica].release([RUNNING], leases))
        self.local.release([RUNNING], leases)
        for lease in leases:
            self.leases.pop(lease, None)

    @precondition(lambda self: any(one.leases for one in self.calls))
    @rule(replica=REPLICA, data=st.data())
    def renew(self, replica: int, data: st.DataObject) -> None:
        """Also late: what has ended does not come back."""
        leases = data.draw(st.sampled_from([one for one in self.calls if one.leases])).leases
        self.run(self.replicas[replica].renew(RUNNING, leases))
        self.local.renew(RUNNING, leases)
        for lease in leases:
            if self.leases.get(lease, 0) > self.now:
                self.leases[lease] = self.now + LEASE_SECONDS * 1000

    def _check_never_over(self) -> None:
        for call in self.calls:  # windows that end with a call are those that can be over
            window = [one for one in self.calls if call.at - WINDOW_MS < one.at <= call.at]
            assert sum(one.requests for one in window) <= MOST[REQUESTS]
        window = [one for one in self.calls if self.now - WINDOW_MS < one.at]
        assert sum(one.tokens for one in window) <= MOST[TOKENS]
        assert len(self._running()) <= MOST[RUNNING]

    def _check_refusal_is_due(self, charges: tuple[Charge, ...], answer: Refused) -> None:
        oldest = self.now - WINDOW_MS - SLACK_MS
        window = [one for one in self.calls if oldest <= one.at]
        used = {
            REQUESTS: sum(one.requests for one in window),
            TOKENS: sum(one.tokens for one in window),
            RUNNING: len(self._running()),
        }
        charge = charges[answer.index]
        assert used[charge.meter] >= answer.used > charge.limit - charge.cost
        assert 0 < answer.retry_ms <= WINDOW_MS + SLACK_MS

    def _running(self) -> list[str]:
        return [lease for lease, ends in self.leases.items() if ends > self.now]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[type[LimiterMachine]]:
    with asyncio.Runner() as runner:
        valkey = EmbeddedValkey(tmp_path)
        runner.run(valkey.start())
        client = Redis.from_url(valkey.url)
        runner.run(client.config_set("appendfsync", "no"))
        try:
            yield type(
                "Machine", (LimiterMachine,), {"run": staticmethod(runner.run), "redis": client}
            )
        finally:
            runner.run(client.aclose())
            runner.run(valkey.stop())


def test_never_more_than_the_limit_in_any_window(machine: type[LimiterMachine]) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=100,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
