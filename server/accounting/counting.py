"""Counting for every server, and on this one alone while Redis is away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from prefix_store.ending import end
from server.accounting.counters import (
    LEASE_SECONDS,
    Charge,
    LocalCounters,
    Meter,
    Refused,
    Standing,
    Taken,
)
from server.accounting.reaching import Breaker
from server.accounting.redis_counters import RedisCounters

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Charged:
    """Where a charge was made: here always, in Redis if it answered."""

    local: Taken
    remote: Taken | None

    @property
    def standings(self) -> tuple[Standing, ...]:
        """How the meters are after it."""
        return (self.remote or self.local).standings


class Counting:
    """Charges meters in Redis, and mirrors that here, so that it can go on alone.

    While Redis is away each server grants the whole limit by itself. Use from one event loop;
    start it, and close it at the end.
    """

    def __init__(
        self,
        remote: RedisCounters,
        breaker: Breaker,
        *,
        local: LocalCounters | None = None,
        renew_seconds: float = LEASE_SECONDS / 3,
    ) -> None:
        """
        Args:
            breaker: what all calls for requests go through.
            renew_seconds: how often leases are renewed.
        """
        self._remote = remote
        self._breaker = breaker
        self._local = local or LocalCounters()
        self._renew_seconds = renew_seconds
        self._leases: dict[Meter, set[str]] = {}
        self._work: set[asyncio.Task[None]] = set()
        self._renewing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to renew leases."""
        self._renewing = asyncio.create_task(self._renew())

    async def close(self) -> None:
        """Finish giving back what ended requests held."""
        if self._renewing is not None:
            await end(self._renewing)
        if self._work:
            await asyncio.wait(self._work, timeout=_CLOSE_SECONDS)
        if self._work:
            await end(*self._work)

    async def take(
        self, charges: Sequence[Charge], leases: Sequence[str] = ()
    ) -> Charged | Refused:
        """Charge everything, or nothing if something would be over its limit."""
        remote = await self._breaker.call(lambda: self._remote.take(charges, leases))
        if isinstance(remote, Refused):
            return remote
        local = self._local.take(charges, leases, enforce=remote is None)
        if isinstance(local, Refused):
            return local
        for charge in charges:
            if not charge.meter.is_rate:
                self._leases.setdefault(charge.meter, set()).update(leases)
        return Charged(local, remote)

    def settle(self, charged: Charged, meters: Sequence[Meter], change: int) -> asyncio.Task[None]:
        """Change a charge, at once here and soon in Redis: await the task to be sure of that."""
        self._local.settle(meters, charged.local.second, change)
        remote = charged.remote
        if remote is None:
            return self._soon(None)
        return self._soon(lambda: self._remote.settle(meters, remote.second, change))

    def release(self, charged: Charged, meters: Sequence[Meter], lease: str) -> asyncio.Task[None]:
        """End a lease, at once here and soon in Redis: await the task to be sure of that."""
        self._local.release(meters, [lease])
        for meter in meters:
            held = self._leases.get(meter, set())
            held.discard(lease)
            if not held:
                self._leases.pop(meter, None)
        if charged.remote is None:
            return self._soon(None)
        return self._soon(lambda: self._remote.release(meters, [lease]))

    def _soon(self, call: Callable[[], Coroutine[Any, Any, None]] | None) -> asyncio.Task[None]:
        """In a task of its own: a request that is cancelled must still give back what it has."""
        task = asyncio.create_task(self._carry_out(call))
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        return task

    async def _carry_out(self, call: Callable[[], Coroutine[Any, Any, None]] | None) -> None:
        if call is not None:
            await self._breaker.call(call)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._renew_seconds)
            for meter, held in list(self._leases.items()):
                leases = list(held)
                self._local.renew(meter, leases)
                await self._renew_remotely(meter, leases)

    async def _renew_remotely(self, meter: Meter, leases: Sequence[str]) -> None:
        try:
            await self._breaker.call(lambda: self._remote.renew(meter, leases))
        except Exception:
            logger.exception("renewing the places of running requests failed; trying again")
