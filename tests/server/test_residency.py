"""Prefixes between the store and the engine: two tiers, their budgets, and what waits for room."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from httpx_sse import connect_sse

from prefix_store.artefact import Artefact
from prefix_store.embedded import EmbeddedValkey
from prefix_store.errors import CorruptArtefactError
from prefix_store.groups import DECODER
from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix
from prefix_store.redis_store import RedisPrefixStore
from prefix_store.store import TaskRecord
from server.engine.native import NativeEngine
from server.engine.protocol import EngineConfig, GenerationRequest, SamplingParams
from server.metrics import Metrics
from server.residency import ResidentPrefixes
from tests.engine.reference import greedy, random_prefix
from tests.server.live import live_server

ENDLESS: dict[str, Any] = {"inputs": "Hello", "parameters": {"max_new_tokens": 8000}}


class World:
    """A store with tasks, an engine, and the prefixes between them."""

    def __init__(
        self,
        valkey: EmbeddedValkey,
        store: RedisPrefixStore,
        engine: NativeEngine,
        host_prefixes: int,
    ) -> None:
        one = engine.prefix_bytes(4, (DECODER,))
        self.valkey, self.store, self.engine = valkey, store, engine
        self.metrics = Metrics()
        self.prefixes = ResidentPrefixes(
            store,
            engine,
            self.metrics,
            device_bytes=one,
            host_bytes=host_prefixes * one,
            room_seconds=5,
        )

    async def tokens(self, record: TaskRecord, name: str) -> list[int]:
        request = GenerationRequest(name, (9, 10), SamplingParams(max_new_tokens=5), record.version)
        async with self.prefixes.lease(record):
            return [event.chosen.token_id async for event in self.engine.submit(request)]

    def metric(self, name: str, tier: str) -> float:
        found = re.search(
            rf'prefixserve_prefix_{name}{{tier="{tier}"}} (\S+)', self.metrics.exposition().decode()
        )
        assert found, name
        return float(found[1])


@asynccontextmanager
async def world(loaded: LoadedModel, folder: Path, host_prefixes: int) -> AsyncIterator[World]:
    async with EmbeddedValkey(folder) as valkey:
        store = RedisPrefixStore.from_url(valkey.url, timeout=1)
        engine = NativeEngine(loaded, EngineConfig(max_slots=2, max_length=64))
        world = World(valkey, store, engine, host_prefixes)
        try:
            yield world
        finally:
            await world.prefixes.close()
            await engine.close()
            await store.close()


async def test_what_the_device_dropped_returns_from_the_host_without_the_store(
    tiny_llama: LoadedModel, tmp_path: Path
) -> None:
    prefixes = [random_prefix(tiny_llama, 4, seed) for seed in range(2)]
    expected = [greedy(tiny_llama, prefix, (9, 10), 5)[0] for prefix in prefixes]
    async with world(tiny_llama, tmp_path, host_prefixes=2) as here:
        records = [
            await here.store.put(f"task-{i}", Artefact.of(prefix))
            for i, prefix in enumerate(prefixes)
        ]
        for record in records:
            await here.tokens(record, record.task_id)
        await here.valkey.stop()
        found = [await here.tokens(record, f"again-{record.task_id}") for record in records]

        assert found == expected
        assert here.metric("cache_prefixes", "device") == 1
        assert here.metric("cache_prefixes", "host") == 2
        assert here.metric("cache_evictions_total", "device") == 3
        assert here.metric("load_seconds_count", "host") == 2


async def test_one_tier_holds_the_engines_dtype_and_nothing_else(
    tiny_llama: LoadedModel, tmp_path: Path
) -> None:
    prefix = random_prefix(tiny_llama, 4, 0).to("cpu", torch.bfloat16)
    async with world(tiny_llama, tmp_path, host_prefixes=0) as here:
        record = await here.store.put("half", Artefact.of(prefix))
        async with here.prefixes.lease(record):
            held = here.engine._prefixes[record.version]
            assert held.nbytes == here.metric("cache_bytes", "device") == 2 * prefix.nbytes
            assert here.metric("cache_prefixes", "host") == 0


async def test_an_artefact_that_is_larger_than_its_task_says_is_not_loaded(
    tiny_llama: LoadedModel, tmp_path: Path
) -> None:
    async with world(tiny_llama, tmp_path, host_prefixes=0) as here:
        record = await here.store.put("a", Artefact.of(random_prefix(tiny_llama, 4, 0)))
        smaller = TaskRecord(
            **{name: getattr(record, name) for name in record.__slots__} | {"prefix_length": 3}
        )
        with pytest.raises(CorruptArtefactError, match="prefix length 4"):
            async with here.prefixes.lease(smaller):
                pass
        assert here.metric("cache_bytes", "device") == 0


async def test_many_loads_at_once_stay_within_both_budgets(
    tiny_llama: LoadedModel, tmp_path: Path
) -> None:
    prefixes = [random_prefix(tiny_llama, 4, seed) for seed in range(12)]
    async with world(tiny_llama, tmp_path, host_prefixes=3) as here:
        records = [
            await here.store.put(f"task-{i}", Artefact.of(prefix))
            for i, prefix in enumerate(prefixes)
        ]
        found = await asyncio.gather(*(here.tokens(record, record.task_id) for record in records))
        assert found == [greedy(tiny_llama, prefix, (9, 10), 5)[0] for prefix in prefixes]
        assert here.metric("cache_prefixes", "device") == len(here.engine._prefixes) == 1
        assert here.metric("cache_prefixes", "host") == 3


@pytest.fixture
def crowded(endless: LoadedModel, prefixes: dict[str, Prefix]) -> list[str]:
    """Flags of a server with room for the longest prefix and nothing beside it."""
    return ["--prefix-cache-bytes", str(prefixes["long"].nbytes), "--max-length", "8192"]


def test_a_request_waits_until_another_leaves_room(
    endless: LoadedModel, prefixes: dict[str, Prefix], crowded: list[str], tmp_path: Path
) -> None:
    with (
        live_server(endless, tmp_path, *crowded, "--prefix-room-seconds", "60") as server,
        ThreadPoolExecutor(1) as thread,
    ):
        for task_id in ("long", "short"):
            server.upload(task_id, prefixes[task_id])
        expected = server.generate("Hello", "short", max_new_tokens=4)
        body = {**ENDLESS, "task_id": "long"}
        with connect_sse(server.client, "POST", "/generate_stream", json=body) as source:
            events = source.iter_sse()  # to let go of it is to go away
            next(events)
            waiting = thread.submit(server.generate, "Hello", "short", max_new_tokens=4)
            server.wait_until("prefix_cache_waiting", 1, tier="device")
            assert server.metric("running_requests") == 1
            assert server.generate("Hello", max_new_tokens=2)["task_id"] is None
        assert waiting.result() == expected
        assert server.metric("prefix_cache_waiting", tier="device") == 0


def test_a_request_that_gets_no_room_is_told_to_try_again(
    endless: LoadedModel, prefixes: dict[str, Prefix], crowded: list[str], tmp_path: Path
) -> None:
    with live_server(endless, tmp_path, *crowded, "--prefix-room-seconds", "0.05") as server:
        for task_id in ("long", "short"):
            server.upload(task_id, prefixes[task_id])
        body = {**ENDLESS, "task_id": "long"}
        with connect_sse(server.client, "POST", "/generate_stream", json=body) as source:
            events = source.iter_sse()  # to let go of it is to go away
            next(events)
            answer = server.client.post("/generate", json={"inputs": "Hello", "task_id": "short"})
            assert (answer.status_code, answer.json()["error_type"]) == (503, "overloaded")
            assert "retry-after" in answer.headers
            assert str(prefixes["long"].nbytes) in answer.json()["error"]
        server.wait_until("running_requests", 0)
        assert server.generate("Hello", "short", max_new_tokens=2)["task_id"] == "short"


def test_a_prefix_larger_than_the_memory_for_all_is_refused_at_upload_and_use(
    endless: LoadedModel, prefixes: dict[str, Prefix], tmp_path: Path
) -> None:
    with live_server(endless, tmp_path) as server:
        server.upload("long", prefixes["long"])
    room = str(prefixes["middle"].nbytes)
    with live_server(endless, tmp_path, "--prefix-cache-bytes", room) as server:
        server.upload("middle", prefixes["middle"])
        files = {"file": prefixes["long"].to_bytes()}
        text = {"text": "Hello there! " * 20}
        for answer in (
            server.client.put("/admin/tasks/new", files=files),
            server.client.put("/admin/tasks/new", json=text),
            server.client.post("/generate", json={"inputs": "Hello", "task_id": "long"}),
        ):
            assert (answer.status_code, answer.json()["error_type"]) == (413, "too_large")
            assert room in answer.json()["error"]
        assert server.client.get("/admin/tasks/new").status_code == 404


def test_a_prefix_loads_before_its_request_has_a_slot(
    endless: LoadedModel, prefixes: dict[str, Prefix], tmp_path: Path
) -> None:
    flags = ["--max-slots", "1", "--max-length", "8192"]
    with live_server(endless, tmp_path, *flags) as server, ThreadPoolExecutor(1) as thread:
        server.upload("short", prefixes["short"])
        with connect_sse(server.client, "POST", "/generate_stream", json=ENDLESS) as source:
            events = source.iter_sse()  # to let go of it is to go away
            next(events)
            queued = thread.submit(server.generate, "Hello", "short", max_new_tokens=2)
            server.wait_until("waiting_requests", 1)
            assert server.metric("prefix_load_seconds_count", tier="device") == 1
            assert server.metric("running_requests") == 1
        assert queued.result()["task_id"] == "short"


def test_warm_up_loads_before_the_server_is_ready(
    endless: LoadedModel,
    prefixes: dict[str, Prefix],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with live_server(endless, tmp_path) as server:
        for task_id, prefix in prefixes.items():
            server.upload(task_id, prefix)
    with (
        caplog.at_level("INFO", logger="server"),
        live_server(endless, tmp_path, "--warm-up", "short,long,nobody") as server,
    ):
        assert server.metric("prefix_cache_prefixes", tier="device") == 2
        server.generate("Hello", "long", max_new_tokens=2)
        assert server.metric("prefix_cache_hits_total", tier="device") == 1
    assert "there is no task 'nobody'" in caplog.text
    assert "warm-up: 2 of 2 tasks" in caplog.text
