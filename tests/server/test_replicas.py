"""Two servers on one store: what one changes the other serves, and neither needs it to go on."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from redis import Redis

from prefix_store.embedded import EmbeddedValkey
from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix
from tests.engine.reference import random_prefix
from tests.server.live import DEADLINE_SECONDS, LiveServer, live_server


@pytest_asyncio.fixture
async def valkey(tmp_path: Path) -> AsyncIterator[EmbeddedValkey]:
    valkey = EmbeddedValkey(tmp_path / "external")
    await valkey.start()
    yield valkey
    await valkey.stop()


@pytest.fixture
def replicas(
    valkey: EmbeddedValkey, endless: LoadedModel, tmp_path: Path
) -> Iterator[tuple[LiveServer, LiveServer]]:
    flags = ["--redis-url", valkey.url, "--store-timeout-seconds", "2", "--max-slots", "4"]
    with (
        live_server(endless, tmp_path / "a", *flags) as first,
        live_server(endless, tmp_path / "b", *flags) as second,
    ):
        yield first, second


def asked(server: LiveServer, task_id: str) -> str | int:
    """The version that serves a request of the task, or the status that refuses it."""
    body = {"inputs": "Hi", "task_id": task_id, "parameters": {"max_new_tokens": 1}}
    answer = server.client.post("/generate", json=body)
    return str(answer.json()["version"]) if answer.is_success else answer.status_code


def until(value: Callable[[], Any], expected: Any) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while (found := value()) != expected:
        assert time.monotonic() < deadline, f"{found!r} and not {expected!r}"
        time.sleep(0.01)


@pytest.mark.parametrize("drop", [False, True], ids=["connected", "connection dropped"])
def test_a_change_on_one_server_is_seen_by_the_other(
    replicas: tuple[LiveServer, LiveServer],
    valkey: EmbeddedValkey,
    endless: LoadedModel,
    drop: bool,
) -> None:
    writer, reader = replicas
    old, new = (random_prefix(endless, 4, seed=seed) for seed in (300, 301))
    assert asked(reader, "task") == httpx.codes.NOT_FOUND
    with Redis.from_url(valkey.url) as redis:

        def change(*request: Any, **body: Any) -> httpx.Response:
            answer = writer.client.request(*request, **body)
            if drop:
                redis.client_kill_filter(_type="pubsub")
            return answer

        path = "/admin/tasks/task"
        first = change("PUT", path, files={"file": old.to_bytes()}).json()["version"]
        until(lambda: asked(reader, "task"), first)
        second = change("PUT", path, files={"file": new.to_bytes()}).json()["version"]
        until(lambda: asked(reader, "task"), second)
        assert asked(writer, "task") == second
        change("POST", f"{path}/rollback")
        until(lambda: asked(reader, "task"), first)
        change("POST", f"{path}/split", json={second: 100})
        until(lambda: asked(reader, "task"), second)
        change("DELETE", path)
        until(lambda: asked(reader, "task"), httpx.codes.NOT_FOUND)
        assert asked(writer, "task") == httpx.codes.NOT_FOUND


async def test_an_outage_and_what_changed_meanwhile(
    replicas: tuple[LiveServer, LiveServer],
    valkey: EmbeddedValkey,
    prefixes: dict[str, Prefix],
) -> None:
    writer, reader = replicas
    served = writer.upload("task", prefixes["short"])["version"]
    until(lambda: asked(reader, "task"), served)
    assert reader.client.get("/health/ready").json() == {"status": "ready", "store": "connected"}
    assert reader.metric("store_connected") == 1

    await valkey.stop()
    reader.wait_until("store_connected", 0)
    ready = reader.client.get("/health/ready")
    assert (ready.status_code, ready.json()["store"]) == (200, "away")
    assert asked(reader, "task") == served
    refused = reader.client.put("/admin/tasks/task", files={"file": prefixes["long"].to_bytes()})
    assert (refused.status_code, refused.json()["error_type"]) == (503, "unavailable")

    await valkey.start()
    replaced = writer.upload("task", prefixes["long"])["version"]
    until(lambda: asked(reader, "task"), replaced)
    reader.wait_until("store_connected", 1)
