"""The connector for a stock `vllm serve` whose prefixes are in a prefix store (`docs/vllm.md`)."""

from __future__ import annotations

import asyncio
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from prefix_store.errors import PrefixStoreError
from prefix_store.opening import opened_store
from prefix_store.prefix import Prefix
from server.engine.vllm.connector import PrefixConnector
from server.engine.vllm.source import PrefixSource, PrefixUnavailableError

_KEPT = 64
"""Prefixes that each worker keeps in its memory."""


class StoreSource:
    """Prefixes from the store at `redis_url`; a worker waits for those that it does not know."""

    def __init__(self, redis_url: str) -> None:
        self._url = redis_url
        self.read = lru_cache(maxsize=_KEPT)(self._read)

    def _read(self, version: str) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            prefix = Prefix.from_bytes(asyncio.run(self._fetch(version)))
        except PrefixStoreError as error:
            raise PrefixUnavailableError(f"cannot read the prefix {version}: {error}") from error
        return prefix.keys, prefix.values

    async def _fetch(self, version: str) -> bytearray:
        async with opened_store(self._url, Path()) as store:
            return await store.read(version)


class StoreConnector(PrefixConnector):
    """Loads prefixes from the store that `redis_url` in `kv_connector_extra_config` names."""

    @classmethod
    def open_source(cls, extra_config: dict[str, Any]) -> PrefixSource:
        """See `PrefixConnector.open_source`."""
        return StoreSource(extra_config["redis_url"])
