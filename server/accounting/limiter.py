"""Whether a caller's request may begin, and what it holds until it ends."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from server.accounting.book import Allowance, LimitsBook
from server.accounting.counters import RATES, Charge, Kind, Meter, Refused
from server.accounting.counting import Charged, Counting
from server.accounting.errors import LimitExceededError
from server.accounting.limits import KeyLimits
from server.callers import Caller
from server.errors import InvalidRequestError
from server.request_context import current_request

_TENANT = "tenant"
_LIMITS: dict[Kind, str] = {
    "requests": "requests_per_minute",
    "tokens": "tokens_per_minute",
    "running": "concurrent_requests",
    "waiting": "queued_requests",
}
_HEADERS: dict[Kind, str] = {
    "requests": "requests",
    "tokens": "tokens",
    "running": "concurrent-requests",
    "waiting": "queued-requests",
}
_WORDS: dict[Kind, str] = {
    "requests": "has made {used} requests in the last minute",
    "tokens": "has used {used} tokens of the last minute's, and this request may use {cost}",
    "running": "has {used} sequences under way, and this request has {cost}",
    "waiting": "has {used} sequences waiting, and this request has {cost}",
}


@dataclass(frozen=True, slots=True)
class _Held:
    """Some charges that were made together."""

    charged: Charged
    charges: tuple[Charge, ...]

    def meters(self, kind: Kind) -> list[Meter]:
        return [charge.meter for charge in self.charges if charge.meter.kind == kind]


class Limiter:
    """Holds callers to their limits."""

    def __init__(self, book: LimitsBook, counting: Counting) -> None:
        self.book = book
        self._counting = counting

    async def admit(self, caller: Caller, sequences: int) -> Admission:
        """Let a call of so many sequences begin. It must be closed at its end.

        Raises:
            LimitExceededError: too many requests in this minute, or under way.
            InvalidRequestError: more sequences than may ever be under way.
        """
        allowance = await self.book.allowance(caller.tenant, caller.key_id)
        admission = Admission(self._counting, caller, allowance, sequences)
        await admission.enter()
        return admission


class Admission:
    """A call that was let in."""

    def __init__(
        self, counting: Counting, caller: Caller, allowance: Allowance, sequences: int
    ) -> None:
        self.allowance = allowance
        self._counting = counting
        self._caller = caller
        self._entered: _Held | None = None
        self._reserved: _Held | None = None
        self._places = [_Place(secrets.token_hex(8)) for _ in range(sequences)]

    async def enter(self) -> None:
        """See `Limiter.admit`."""
        count = len(self._places)
        leases = [place.lease for place in self._places]
        costs: dict[Kind, int] = {"requests": 1, "running": count, "waiting": count}
        self._entered = await self._take(costs, leases)

    async def reserve(self, tokens: Sequence[int]) -> None:
        """Hold for each sequence the most tokens that it may use, prompt and generated.

        Raises:
            LimitExceededError: too many tokens in this minute.
            InvalidRequestError: more than a minute's.
        """
        self._reserved = await self._take({"tokens": sum(tokens)})
        for place, reserved in zip(self._places, tokens, strict=True):
            place.reserved = reserved

    def started(self, index: int) -> None:
        """A sequence has its first token: it waits no more."""
        place = self._places[index]
        if place.waits and not place.ended:
            place.waits = False
            self._release(place, "waiting")

    async def finished(self, index: int, used: int) -> None:
        """A sequence has ended after so many tokens; the next request finds its place free."""
        if work := self._end(self._places[index], used):
            # Whatever ends the request meanwhile does not end giving back.
            await asyncio.shield(asyncio.gather(*work))

    def close(self, used: Sequence[int]) -> None:
        """End the sequences that have not: given back soon, without waiting for it.

        Args:
            used: of each sequence, tokens until now.
        """
        for place, tokens in zip(self._places, used, strict=True):
            self._end(place, tokens)

    def _end(self, place: _Place, used: int) -> list[asyncio.Task[None]]:
        if place.ended:
            return []
        place.ended = True
        work = self._release(place, *(("running", "waiting") if place.waits else ("running",)))
        if self._reserved is not None and used != place.reserved:
            meters = self._reserved.meters("tokens")
            change = used - place.reserved
            work.append(self._counting.settle(self._reserved.charged, meters, change))
        return work

    def _release(self, place: _Place, *kinds: Kind) -> list[asyncio.Task[None]]:
        entered = self._entered
        meters = [] if entered is None else [m for kind in kinds for m in entered.meters(kind)]
        if not meters or entered is None:
            return []
        return [self._counting.release(entered.charged, meters, place.lease)]

    async def _take(self, costs: dict[Kind, int], leases: Sequence[str] = ()) -> _Held | None:
        """Charge what is limited; None where nothing is."""
        charges = tuple(self._charges(costs))
        if not charges:
            return None
        for charge in charges:
            if charge.cost > charge.limit:
                raise InvalidRequestError(_never(charge))
        answer = await self._counting.take(charges, leases)
        if isinstance(answer, Refused):
            charge = charges[answer.index]
            retry = max(1, answer.retry_ms) / 1000
            _tell(charge.meter.kind, charge.limit, max(0, charge.limit - answer.used), retry)
            raise LimitExceededError(_for_now(charge, answer.used, retry), retry)
        for kind in costs:
            _tell_tightest(kind, charges, answer)
        return _Held(answer, charges)

    def _charges(self, costs: dict[Kind, int]) -> list[Charge]:
        scopes: list[tuple[str, KeyLimits]] = [(_TENANT, self.allowance.tenant)]
        if self.allowance.key is not None:
            scopes.append((f"key.{self._caller.key_id}", self.allowance.key))
        return [
            Charge(Meter(self._caller.tenant, scope, kind), limit, cost)
            for scope, limits in scopes
            for kind, cost in costs.items()
            if (limit := getattr(limits, _LIMITS[kind])) is not None
        ]


@dataclass(slots=True)
class _Place:
    """One sequence of a call."""

    lease: str
    reserved: int = 0
    waits: bool = True
    ended: bool = False


def _tell_tightest(kind: Kind, charges: Sequence[Charge], charged: Charged) -> None:
    """Put the limit of a kind that has the least left into the answer's head."""
    limits = [
        (charge.limit - standing.used, charge.limit, standing.reset_ms)
        for charge, standing in zip(charges, charged.standings, strict=True)
        if charge.meter.kind == kind
    ]
    if limits:
        remaining, limit, reset_ms = min(limits)
        is_rate = kind in RATES  # nobody knows when what runs will have ended
        _tell(kind, limit, remaining, reset_ms / 1000 if is_rate else None)


def _tell(kind: Kind, limit: int, remaining: int, reset_seconds: float | None) -> None:
    name, headers = _HEADERS[kind], current_request().headers
    headers[f"x-ratelimit-limit-{name}"] = str(limit)
    headers[f"x-ratelimit-remaining-{name}"] = str(remaining)
    if reset_seconds is not None:
        headers[f"x-ratelimit-reset-{name}"] = f"{reset_seconds:.3f}s"


def _who(meter: Meter) -> str:
    return f"tenant {meter.tenant!r}" if meter.scope == _TENANT else "this API key"


def _for_now(charge: Charge, used: int, retry: float) -> str:
    kind = charge.meter.kind
    words = _WORDS[kind].format(used=used, cost=charge.cost)
    return (
        f"{_who(charge.meter)} {words}; its limit {_LIMITS[kind]} is {charge.limit}. Try again in "
        f"{retry:.1f} s"
    )


def _never(charge: Charge) -> str:
    kind = charge.meter.kind
    what = "tokens, read and generated," if kind == "tokens" else "sequences"
    return (
        f"this request may use {charge.cost} {what} and {_who(charge.meter)} has a limit "
        f"{_LIMITS[kind]} of {charge.limit}: it can never begin. Send less at once"
    )
