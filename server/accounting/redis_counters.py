"""Counting in Redis, for every server on it: what `LocalCounters` does, each call one script.

A tenant's counts share the hash tag `{<tenant>}`, so that a cluster keeps them on one node:

    prefixserve.limits:{<tenant>}:<scope>:requests   hash  second -> calls
    prefixserve.limits:{<tenant>}:<scope>:tokens     hash  second -> tokens
    prefixserve.limits:{<tenant>}:<scope>:running    zset  lease -> unix milliseconds it ends
    prefixserve.limits:{<tenant>}:<scope>:waiting    zset  the same

All of them expire. The time is the Redis server's own, so that servers' clocks do not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from redis.asyncio import Redis

from server.accounting.counters import (
    LEASE_SECONDS,
    RETRY_MS,
    WINDOW_SECONDS,
    Charge,
    Meter,
    Refused,
    Standing,
    Taken,
)
from server.accounting.reaching import reaching

_LEASE_MS = LEASE_SECONDS * 1000

_NOW = """
local now = tonumber(ARGV[1])
if not now then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end
"""
_TAKE = (
    _NOW
    + """
local seconds, lease_ms, retry_ms = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local second, first_lease = math.floor(now / 1000), 5 + 3 * #KEYS
local windows = {}

local function ends(at) return (at + seconds + 1) * 1000 end

local function read(key)
  local window = {used = 0, counts = {}, newest = -1}
  local found = redis.call('HGETALL', key)
  for i = 1, #found, 2 do
    local at, count = tonumber(found[i]), tonumber(found[i + 1])
    if at < second - seconds then
      redis.call('HDEL', key, found[i])
    else
      window.used = window.used + count
      table.insert(window.counts, {at = at, count = count})
      if count > 0 then window.newest = math.max(window.newest, at) end
    end
  end
  return window
end

local function retry(window, excess)
  table.sort(window.counts, function(a, b) return a.at < b.at end)
  for _, one in ipairs(window.counts) do
    excess = excess - one.count
    if excess <= 0 then return ends(one.at) - now end
  end
  return ends(second) - now
end

for i, key in ipairs(KEYS) do
  local kind, limit, cost = ARGV[2 + 3 * i], tonumber(ARGV[3 + 3 * i]), tonumber(ARGV[4 + 3 * i])
  if kind == 'rate' then
    local window = read(key)
    windows[i] = window
    local excess = window.used + cost - limit
    if excess > 0 then return {0, i - 1, window.used, retry(window, excess)} end
  else
    redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
    local used = redis.call('ZCARD', key)
    if used + cost > limit then return {0, i - 1, used, retry_ms} end
  end
end

local answer = {1, second}
for i, key in ipairs(KEYS) do
  local cost, window = tonumber(ARGV[4 + 3 * i]), windows[i]
  if window then
    redis.call('HINCRBY', key, second, cost)
    redis.call('PEXPIRE', key, (seconds + 2) * 1000)
    if cost > 0 then window.newest = math.max(window.newest, second) end
    table.insert(answer, window.used + cost)
    table.insert(answer, window.newest < 0 and 0 or ends(window.newest) - now)
  else
    for j = first_lease, #ARGV do redis.call('ZADD', key, now + lease_ms, ARGV[j]) end
    redis.call('PEXPIRE', key, lease_ms)
    table.insert(answer, redis.call('ZCARD', key))
    table.insert(answer, 0)
  end
end
return answer
"""
)
_SETTLE = """
for _, key in ipairs(KEYS) do
  if redis.call('HEXISTS', key, ARGV[1]) == 1 then redis.call('HINCRBY', key, ARGV[1], ARGV[2]) end
end
"""
_RELEASE = """
for _, key in ipairs(KEYS) do redis.call('ZREM', key, unpack(ARGV)) end
"""
# Only leases that have not ended: one that is given back meanwhile must not come back.
_RENEW = (
    _NOW
    + """
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
for i = 3, #ARGV do redis.call('ZADD', KEYS[1], 'XX', now + ARGV[2], ARGV[i]) end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""
)


class RedisCounters:
    """Counts that hold on every server. Every method raises StoreUnavailableError."""

    def __init__(self, client: Redis, clock: Callable[[], int] | None = None) -> None:
        """
        Args:
            clock: unix milliseconds, in place of the Redis server's time.
        """
        self._clock = clock
        self._take = client.register_script(_TAKE)
        self._settle = client.register_script(_SETTLE)
        self._release = client.register_script(_RELEASE)
        self._renew = client.register_script(_RENEW)

    async def take(self, charges: Sequence[Charge], leases: Sequence[str]) -> Taken | Refused:
        """Charge everything, or nothing if something would be over its limit."""
        args: list[str | int] = [self._now(), WINDOW_SECONDS, _LEASE_MS, RETRY_MS]
        for charge in charges:
            args += ["rate" if charge.meter.is_rate else "lease", charge.limit, charge.cost]
        async with reaching():
            done, *rest = await self._take(
                keys=[_key(charge.meter) for charge in charges], args=[*args, *leases]
            )
        if not done:
            return Refused(*rest)
        second, *figures = rest
        return Taken(second, tuple(map(Standing, figures[::2], figures[1::2])))

    async def settle(self, meters: Sequence[Meter], second: int, change: int) -> None:
        """Change what was charged at `second`, where that still counts."""
        async with reaching():
            await self._settle(keys=list(map(_key, meters)), args=[second, change])

    async def release(self, meters: Sequence[Meter], leases: Sequence[str]) -> None:
        """End leases."""
        async with reaching():
            await self._release(keys=list(map(_key, meters)), args=list(leases))

    async def renew(self, meter: Meter, leases: Sequence[str]) -> None:
        """Give leases that have not ended their full time again."""
        async with reaching():
            await self._renew(keys=[_key(meter)], args=[self._now(), _LEASE_MS, *leases])

    def _now(self) -> str | int:
        return "" if self._clock is None else self._clock()


def _key(meter: Meter) -> str:
    return f"prefixserve.limits:{{{meter.tenant}}}:{meter.scope}:{meter.kind}"
