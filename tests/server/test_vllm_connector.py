"""The source of prefixes of a stock `vllm serve` on a prefix store."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from prefix_store.artefact import Artefact
from prefix_store.embedded import EmbeddedValkey
from prefix_store.prefix import Prefix
from prefix_store.redis_store import RedisPrefixStore
from tests.engine.vllm_subject import needs_vllm

pytestmark = [pytest.mark.vllm, needs_vllm]


async def test_prefixes_come_from_the_store(tmp_path: Path) -> None:
    from server.engine.vllm.source import PrefixUnavailableError  # noqa: PLC0415 - imports vLLM
    from server.vllm_connector import StoreConnector  # noqa: PLC0415

    keys, values = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3, 4)
    artefact = Artefact.of(Prefix.of(keys, values, "random"))
    async with EmbeddedValkey(tmp_path) as valkey:
        store = RedisPrefixStore.from_url(valkey.url, timeout=5)
        try:
            await store.put("task", artefact)
        finally:
            await store.close()
        source = StoreConnector.open_source({"redis_url": valkey.url})
        found = await asyncio.to_thread(source.read, artefact.version)
        assert torch.equal(found[0], keys)
        assert torch.equal(found[1], values)
        with pytest.raises(PrefixUnavailableError, match="cannot read the prefix sha256:0"):
            await asyncio.to_thread(source.read, "sha256:" + "0" * 64)
