"""Usage in Redis.

{prefixserve.usage}:<day>            hash    <tenant>/<task>/<quantity> -> count; kept 400 days
{prefixserve.usage}:sent:<sender>    string  number of its last batch that was added; 30 days
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import date, timedelta
from typing import Any

from redis.asyncio import Redis

from server.accounting.reaching import reaching
from server.accounting.usage_types import Batch, Entry, Quantity

KEPT_DAYS = 400

_TAG = "{prefixserve.usage}"
_DAY_SECONDS = 86_400
_SENDER_DAYS = 30
_SCANNED = 1000
# A batch that is sent again, because its answer was lost, is known by its number and not added.
_APPLY = """
if tonumber(redis.call('GET', KEYS[1]) or '0') >= tonumber(ARGV[1]) then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
for i = 4, #ARGV, 3 do redis.call('HINCRBY', KEYS[tonumber(ARGV[i])], ARGV[i + 1], ARGV[i + 2]) end
for i = 2, #KEYS do redis.call('EXPIRE', KEYS[i], ARGV[3]) end
return 1
"""


class UsageStore:
    """Sums of usage. Every method raises StoreUnavailableError."""

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._apply = client.register_script(_APPLY)

    async def apply(self, batch: Batch) -> None:
        """Add a batch, whole or not at all, and only once. Of a sender, in their order."""
        days = sorted({entry.day for entry in batch.counts})
        args: list[str | int] = [
            batch.number,
            _SENDER_DAYS * _DAY_SECONDS,
            KEPT_DAYS * _DAY_SECONDS,
        ]
        for entry, count in batch.counts.items():
            args += [days.index(entry.day) + 2, "/".join(entry[1:]), count]
        keys = [f"{_TAG}:sent:{batch.sender}", *map(_key, days)]
        async with reaching():
            await self._apply(keys=keys, args=args)

    async def read(self, first: date, last: date) -> list[tuple[Entry, int]]:
        """The sums of the days from `first` to `last`."""
        return [found async for found in self._read(first, last)]

    async def _read(self, first: date, last: date) -> AsyncIterator[tuple[Entry, int]]:
        for number in range((last - first).days + 1):
            day = first + timedelta(days=number)
            counts: Any = self._client.hscan_iter(_key(day), count=_SCANNED)
            async with reaching():
                async for field, count in counts:
                    tenant, rest = field.decode().split("/", 1)
                    task_id, quantity = rest.rsplit("/", 1)
                    yield Entry(day, tenant, task_id, Quantity(quantity)), int(count)


def _key(day: date) -> str:
    return f"{_TAG}:{day.isoformat()}"
