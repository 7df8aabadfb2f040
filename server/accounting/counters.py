"""Counting against limits: what is asked, what is answered, and counting in this process.

Rates are sliding windows of 60 seconds, counted by the second: the design of "An alternative
approach to rate limiting" (Mahdi, Figma, 2017). A count holds until its whole second is over 60
seconds old, so that no 60 seconds, wherever they begin, have more than the limit. Sequences that
wait or run are leases: names with a time at which they end by themselves, unless renewed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

WINDOW_SECONDS = 60
LEASE_SECONDS = 15
RETRY_MS = 1000
"""When to ask again for a place; nobody knows when one becomes free."""

_SWEEP_MS = 5000

Kind = Literal["requests", "tokens", "running", "waiting"]
RATES: tuple[Kind, ...] = ("requests", "tokens")


@dataclass(frozen=True, slots=True)
class Meter:
    """One of the things counted of a tenant or of one of its keys."""

    tenant: str
    scope: str
    kind: Kind

    @property
    def is_rate(self) -> bool:
        """A window, rather than leases."""
        return self.kind in RATES


@dataclass(frozen=True, slots=True)
class Charge:
    """So much more on a meter, if it stays within the limit. Of leases, as many as are named."""

    meter: Meter
    limit: int
    cost: int


@dataclass(frozen=True, slots=True)
class Standing:
    """How a meter is after a charge, as `x-ratelimit-*` headers tell it; of leases reset is 0."""

    used: int
    reset_ms: int


@dataclass(frozen=True, slots=True)
class Taken:
    """All was charged.

    Attributes:
        second: when, to give it back with `settle`.
        standings: one for each charge; of leases, how many there are.
    """

    second: int
    standings: tuple[Standing, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """Nothing was charged, because of the charge at `index`; asking again makes sense later."""

    index: int
    used: int
    retry_ms: int


def system_clock() -> int:
    """Unix time in milliseconds."""
    return time.time_ns() // 1_000_000


@dataclass(slots=True)
class _Window:
    """Counts by second."""

    counts: dict[int, int] = field(default_factory=dict)

    def used(self, second: int) -> int:
        for old in [at for at in self.counts if at < second - WINDOW_SECONDS]:
            del self.counts[old]
        return sum(self.counts.values())

    def retry_ms(self, now: int, excess: int) -> int:
        """When so much will be over."""
        for second in sorted(self.counts):
            excess -= self.counts[second]
            if excess <= 0:
                return _ends_ms(second) - now
        return _ends_ms(now // 1000) - now

    def standing(self, now: int) -> Standing:
        newest = max((at for at, count in self.counts.items() if count), default=None)
        reset = 0 if newest is None else _ends_ms(newest) - now
        return Standing(sum(self.counts.values()), reset)


class LocalCounters:
    """Counts for this process alone; `RedisCounters` does the same for all of them."""

    def __init__(self, clock: Callable[[], int] = system_clock) -> None:
        self._clock = clock
        self._windows: dict[Meter, _Window] = {}
        self._leases: dict[Meter, dict[str, int]] = {}
        self._swept = 0

    def take(
        self, charges: Sequence[Charge], leases: Sequence[str], *, enforce: bool = True
    ) -> Taken | Refused:
        """Charge everything, or with `enforce` nothing if something would be over its limit."""
        now = self._clock()
        second = now // 1000
        self._sweep(now)
        for index, charge in enumerate(charges):
            used = self._used(charge.meter, now)
            excess = used + charge.cost - charge.limit
            if enforce and excess > 0:
                retry = RETRY_MS
                if charge.meter.is_rate:
                    retry = self._windows[charge.meter].retry_ms(now, excess)
                return Refused(index, used, retry)
        return Taken(second, tuple(self._add(charge, now, leases) for charge in charges))

    def settle(self, meters: Sequence[Meter], second: int, change: int) -> None:
        """Change what was charged at `second`, where that still counts."""
        for meter in meters:
            window = self._windows.get(meter)
            if window is not None and second in window.counts:
                window.counts[second] += change

    def release(self, meters: Sequence[Meter], leases: Sequence[str]) -> None:
        """End leases."""
        for meter in meters:
            for lease in leases:
                self._leases.get(meter, {}).pop(lease, None)

    def renew(self, meter: Meter, leases: Sequence[str]) -> None:
        """Give leases that have not ended their full time again."""
        expires = self._clock() + LEASE_SECONDS * 1000
        self._used(meter, self._clock())
        found = self._leases[meter]
        found.update((lease, expires) for lease in leases if lease in found)

    def _used(self, meter: Meter, now: int) -> int:
        if meter.is_rate:
            return self._windows.setdefault(meter, _Window()).used(now // 1000)
        found = self._leases.setdefault(meter, {})
        for ended in [lease for lease, expires in found.items() if expires <= now]:
            del found[ended]
        return len(found)

    def _add(self, charge: Charge, now: int, leases: Sequence[str]) -> Standing:
        if charge.meter.is_rate:
            window, second = self._windows[charge.meter], now // 1000
            window.counts[second] = window.counts.get(second, 0) + charge.cost
            return window.standing(now)
        found = self._leases[charge.meter]
        found.update(dict.fromkeys(leases, now + LEASE_SECONDS * 1000))
        return Standing(len(found), 0)

    def _sweep(self, now: int) -> None:
        """Forget, now and then, meters with nothing on them."""
        if now - self._swept < _SWEEP_MS:
            return
        self._swept = now
        for meter in [*self._windows, *self._leases]:
            if not self._used(meter, now):
                self._windows.pop(meter, None)
                self._leases.pop(meter, None)


def _ends_ms(second: int) -> int:
    """When a second's counts end to count."""
    return (second + WINDOW_SECONDS + 1) * 1000
