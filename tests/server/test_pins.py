"""Pinned tasks stay loaded, on every server, and no more are pinned than fit."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from prefix_store.embedded import EmbeddedValkey
from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix
from tests.engine.reference import random_prefix
from tests.server.live import LiveServer, live_server


@pytest_asyncio.fixture(scope="module")
async def valkey(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedValkey]:
    async with EmbeddedValkey(tmp_path_factory.mktemp("pins")) as running:
        yield running


def flags(valkey: EmbeddedValkey, room: int) -> list[str]:
    return ["--redis-url", valkey.url, "--prefix-cache-bytes", str(room)]


def pinned_bytes(server: LiveServer, nbytes: int) -> None:
    """Wait until so much is pinned."""
    server.wait_until("prefix_cache_pinned_bytes", nbytes, tier="device")


async def test_a_pinned_task_stays_loaded_everywhere_also_after_a_restart(
    endless: LoadedModel, prefixes: dict[str, Prefix], valkey: EmbeddedValkey, tmp_path: Path
) -> None:
    short, long = prefixes["short"], prefixes["long"]
    options = flags(valkey, short.nbytes + long.nbytes)
    with live_server(endless, tmp_path, *options) as one:
        with live_server(endless, tmp_path, *options) as other:
            for task_id, prefix in prefixes.items():
                one.upload(task_id, prefix)
            answer = one.client.post("/admin/tasks/short/pin")
            assert (answer.status_code, answer.json()["pinned"]) == (200, True)
            for server in (one, other):
                pinned_bytes(server, short.nbytes)
            for task_id in ("long", "middle", "long", "middle"):  # no two fit beside it
                other.generate("Hello", task_id, max_new_tokens=1)
            hits = other.metric("prefix_cache_hits_total", tier="device")
            other.generate("Hello", "short", max_new_tokens=1)
            assert other.metric("prefix_cache_hits_total", tier="device") == hits + 1
        with live_server(endless, tmp_path, *options) as restarted:
            assert restarted.metric("prefix_cache_pinned_bytes", tier="device") == short.nbytes
            answer = restarted.client.delete("/admin/tasks/short/pin")
            assert (answer.status_code, answer.json()["pinned"]) == (200, False)
            for server in (one, restarted):
                pinned_bytes(server, 0)


async def test_the_pin_follows_the_task_to_another_version_and_ends_with_it(
    endless: LoadedModel, prefixes: dict[str, Prefix], valkey: EmbeddedValkey, tmp_path: Path
) -> None:
    with live_server(endless, tmp_path, *flags(valkey, 10**6)) as server:
        old = server.upload("moving", prefixes["short"])
        server.client.post("/admin/tasks/moving/pin")
        pinned_bytes(server, prefixes["short"].nbytes)
        new = server.upload("moving", prefixes["long"])
        pinned_bytes(server, prefixes["long"].nbytes)
        assert server.client.get("/admin/tasks/moving").json()["pinned"] is True
        shares = {old["version"]: 50, new["version"]: 50}
        server.client.post("/admin/tasks/moving/split", json=shares)
        pinned_bytes(server, prefixes["short"].nbytes + prefixes["long"].nbytes)
        server.client.delete("/admin/tasks/moving")
        pinned_bytes(server, 0)


async def test_pins_that_do_not_fit_are_refused_and_those_in_place_stay(
    endless: LoadedModel, prefixes: dict[str, Prefix], valkey: EmbeddedValkey, tmp_path: Path
) -> None:
    long, middle = prefixes["long"], prefixes["middle"]
    with live_server(endless, tmp_path, *flags(valkey, long.nbytes)) as server:
        for task_id in ("long", "middle"):
            server.upload(task_id, prefixes[task_id])
        assert server.client.post("/admin/tasks/nobody/pin").status_code == 404
        server.client.post("/admin/tasks/long/pin")
        pinned_bytes(server, long.nbytes)
        answer = server.client.post("/admin/tasks/middle/pin")
        assert (answer.status_code, answer.json()["error_type"]) == (409, "conflict")
        assert f"{middle.nbytes} bytes" in answer.json()["error"]
        assert server.client.get("/admin/tasks/middle").json()["pinned"] is False
        refused = server.client.post("/generate", json={"inputs": "Hello", "task_id": "middle"})
        assert (refused.status_code, refused.json()["error_type"]) == (503, "overloaded")
        assert "pinned" in refused.json()["error"]
        assert server.generate("Hello", "long", max_new_tokens=1)["task_id"] == "long"
        server.client.delete("/admin/tasks/long/pin")
        pinned_bytes(server, 0)
        assert server.generate("Hello", "middle", max_new_tokens=1)["task_id"] == "middle"


async def test_a_server_with_less_room_pins_what_fits(
    endless: LoadedModel, valkey: EmbeddedValkey, tmp_path: Path
) -> None:
    prefix = random_prefix(endless, 5, seed=400)
    with live_server(endless, tmp_path, *flags(valkey, 3 * prefix.nbytes)) as roomy:
        for number in range(3):
            roomy.upload(f"pinned-{number}", random_prefix(endless, 5, seed=400 + number))
            roomy.client.post(f"/admin/tasks/pinned-{number}/pin")
            pinned_bytes(roomy, (number + 1) * prefix.nbytes)
        with live_server(endless, tmp_path, *flags(valkey, 2 * prefix.nbytes)) as small:
            assert small.metric("prefix_cache_pinned_bytes", tier="device") == 2 * prefix.nbytes
            for number in range(2):
                assert small.generate("Hello", f"pinned-{number}", max_new_tokens=1)
