"""The limits that operators have set: kept in Redis, known here for a second."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from pydantic import ValidationError
from redis.asyncio import Redis

from server.accounting.limits import KeyLimits, TenantLimits
from server.accounting.reaching import Breaker, reaching

logger = logging.getLogger(__name__)

RECORDS = "prefixserve.limits"
"""A hash: `<tenant>` or `<tenant>/<key id>` -> what is set, as JSON."""

FRESH_SECONDS = 1.0
"""A change has effect on every server within this."""

_MAX_KNOWN = 20_000

Limits = TypeVar("Limits", bound=KeyLimits)


@dataclass(frozen=True, slots=True)
class Allowance:
    """What holds for one caller: defaults filled in.

    Attributes:
        key: of the API key alone; None where nothing is set for it.
    """

    tenant: TenantLimits
    key: KeyLimits | None = None

    @property
    def max_new_tokens(self) -> int | None:
        """The smaller of both."""
        both = (self.tenant.max_new_tokens, None if self.key is None else self.key.max_new_tokens)
        return min((most for most in both if most is not None), default=None)


class LimitsBook:
    """Looks limits up; while the store is away it answers what it knows, or the defaults."""

    def __init__(
        self,
        client: Redis,
        defaults: TenantLimits,
        breaker: Breaker,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            defaults: limits of a tenant for which nothing else is set.
            breaker: what all calls for requests go through.
            clock: seconds.
        """
        self._client = client
        self._defaults = defaults
        self._breaker = breaker
        self._clock = clock
        self._known: OrderedDict[tuple[str, str | None], tuple[float, Allowance]] = OrderedDict()

    async def allowance(self, tenant: str, key_id: str | None = None) -> Allowance:
        """What a caller may use, at most `FRESH_SECONDS` old while the store answers."""
        name = (tenant, key_id)
        read, known = self._known.get(name, (None, Allowance(self._defaults)))
        if read is None or self._clock() - read >= FRESH_SECONDS:
            found = await self._breaker.call(lambda: self._read(tenant, key_id))
            if found is None:
                return known
            known = found
            self._remember(name, known)
        return known

    async def of_tenant(self, tenant: str) -> TenantLimits:
        """What is set for a tenant, without defaults.

        Raises:
            StoreUnavailableError
        """
        return _parsed(await self._text(tenant, None), TenantLimits)

    async def of_key(self, tenant: str, key_id: str) -> KeyLimits:
        """What is set for one of a tenant's keys.

        Raises:
            StoreUnavailableError
        """
        return _parsed(await self._text(tenant, key_id), KeyLimits)

    async def list(self) -> dict[str, TenantLimits]:
        """What is set for each tenant for which anything is; without defaults.

        Raises:
            StoreUnavailableError
        """
        async with reaching():
            found = await cast("Any", self._client.hgetall(RECORDS))
        names = sorted(name.decode() for name in found if b"/" not in name)
        return {name: _parsed(found[name.encode()], TenantLimits) for name in names}

    async def set(self, tenant: str, limits: KeyLimits, key_id: str | None = None) -> None:
        """Replace what is set; a record without any limit is the defaults again.

        Raises:
            StoreUnavailableError
        """
        text = limits.model_dump_json(exclude_unset=True)
        async with reaching():
            if limits.model_fields_set:
                await cast("Any", self._client.hset(RECORDS, _field(tenant, key_id), text))
            else:
                await cast("Any", self._client.hdel(RECORDS, _field(tenant, key_id)))
        self._known = OrderedDict(
            (name, known) for name, known in self._known.items() if name[0] != tenant
        )

    def effective(self, limits: TenantLimits) -> TenantLimits:
        """What is set, and the defaults."""
        return limits.over(self._defaults)

    async def _text(self, tenant: str, key_id: str | None) -> bytes | None:
        async with reaching():
            found = self._client.hget(RECORDS, _field(tenant, key_id))
            return await cast("asyncio.Future[bytes | None]", found)

    async def _read(self, tenant: str, key_id: str | None) -> Allowance:
        fields = [_field(tenant, None)]
        if key_id is not None:
            fields.append(_field(tenant, key_id))
        async with reaching():
            found = await cast("Any", self._client.hmget(RECORDS, fields))
        of_tenant = _parsed(found[0], TenantLimits).over(self._defaults)
        of_key = _parsed(found[1], KeyLimits) if found[1:] and found[1] else None
        return Allowance(of_tenant, of_key)

    def _remember(self, name: tuple[str, str | None], known: Allowance) -> None:
        self._known[name] = (self._clock(), known)
        self._known.move_to_end(name)
        if len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)


def _field(tenant: str, key_id: str | None) -> str:
    return tenant if key_id is None else f"{tenant}/{key_id}"


def _parsed(text: bytes | None, kind: type[Limits]) -> Limits:
    """A record; one that cannot be read sets nothing."""
    try:
        return kind.model_validate_json(text or b"{}")
    except ValidationError:
        logger.exception("a record of limits in the store cannot be read; the defaults hold")
        return kind()
