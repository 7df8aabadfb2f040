"""API keys in Redis: read, compared and changed. Of each there is a hash, never the key itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from prefix_store.api_key import ApiKey
from prefix_store.errors import UnknownKeyError
from prefix_store.redis_store import layout
from prefix_store.redis_store.commits import Commits, Kind
from prefix_store.redis_store.connecting import Connected
from prefix_store.redis_store.durability import Wait
from prefix_store.redis_store.layout import key_from_json, key_to_json

_SCANNED = 500


class RedisKeyStore:
    """`KeyStore` in the server that has the tasks."""

    def __init__(self, connected: Connected, commits: Commits, wait: Wait) -> None:
        self._connected = connected
        self._client = connected.client
        self._commits = commits
        self._wait = wait

    async def get(self, key_id: str) -> ApiKey:
        """See `KeyStore.get`."""
        async with self._connected.reaching():
            key = _parsed(key_id, await self._text(key_id))
        if key is None:
            raise UnknownKeyError(f"no API key {key_id[:80]!r}")
        return key

    async def list(self) -> list[ApiKey]:
        """See `KeyStore.list`."""
        async with self._connected.reaching():
            found = {
                name.decode(): key_from_json(name.decode(), text)
                async for name, text in self._client.hscan_iter(layout.KEYS, count=_SCANNED)
            }
        return sorted(found.values(), key=lambda key: (key.tenant, key.created_at, key.key_id))

    async def change(self, key_id: str, step: Callable[[ApiKey | None], ApiKey]) -> ApiKey:
        """See `KeyStore.change`."""
        async with self._connected.reaching():
            while True:
                before = await self._text(key_id)
                after = step(_parsed(key_id, before))
                if await self._commits.commit(Kind.KEY, key_id, before, key_to_json(after)):
                    break
            await self._wait.confirm(self._client, self._connected.timeout)
        return after

    async def _text(self, key_id: str) -> bytes:
        found = self._client.hget(layout.KEYS, key_id)
        return await cast("asyncio.Future[bytes | None]", found) or b""


def _parsed(key_id: str, text: bytes) -> ApiKey | None:
    return key_from_json(key_id, text) if text else None
