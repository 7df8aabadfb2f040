"""Limits over HTTP, on two servers with one store."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from httpx_sse import connect_sse
from redis import Redis

from prefix_store.embedded import EmbeddedValkey
from prefix_store.model_loading import LoadedModel
from server.accounting import book
from tests.server.conftest import MAX_LENGTH
from tests.server.live import DEADLINE_SECONDS, LiveServer, live_server

SLOTS = 2
LIMITS = "/admin/tenants/default/limits"
TOLD = ("limit", "remaining", "reset")


@pytest_asyncio.fixture(scope="module")
async def valkey(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedValkey]:
    valkey = EmbeddedValkey(tmp_path_factory.mktemp("limits"))
    await valkey.start()
    yield valkey
    await valkey.stop()


@pytest.fixture(scope="module")
def servers(
    valkey: EmbeddedValkey, endless: LoadedModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LiveServer, LiveServer]]:
    flags = ["--redis-url", valkey.url, "--max-slots", str(SLOTS), "--max-length", str(MAX_LENGTH)]
    folder = tmp_path_factory.mktemp("data")
    with (
        live_server(endless, folder / "a", *flags) as first,
        live_server(endless, folder / "b", *flags) as second,
    ):
        yield first, second


@pytest.fixture(autouse=True)
def clean(valkey: EmbeddedValkey, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing counted, no limits; and changes are seen at once."""
    monkeypatch.setattr(book, "FRESH_SECONDS", 0.0)
    with Redis.from_url(valkey.url) as redis:
        for key in redis.scan_iter("prefixserve.limits*"):
            redis.delete(key)


def limit(server: LiveServer, **limits: int | None) -> None:
    answer = server.client.put(LIMITS, json=limits)
    assert answer.status_code == httpx.codes.OK, answer.text
    assert answer.json()["limits"] == limits


def ask(server: LiveServer, inputs: str | list[str] = "Hi", **parameters: Any) -> httpx.Response:
    parameters.setdefault("max_new_tokens", 2)
    return server.client.post("/generate", json={"inputs": inputs, "parameters": parameters})


@contextmanager
def running(server: LiveServer) -> Iterator[None]:
    """A stream that goes on, after its first token."""
    body = {"inputs": "Hi", "parameters": {"max_new_tokens": MAX_LENGTH - 100}}
    with connect_sse(server.client, "POST", "/generate_stream", json=body) as source:
        assert source.response.status_code == httpx.codes.OK, source.response.read()
        events = source.iter_sse()
        next(events)
        yield
        events.close()


def until_allowed(server: LiveServer) -> None:
    """What a closed stream held is free soon: the server notices that its client went."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while ask(server).status_code != httpx.codes.OK:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_refused(answer: httpx.Response, *words: str) -> None:
    assert answer.status_code == httpx.codes.TOO_MANY_REQUESTS, answer.text
    assert answer.json()["error_type"] == "rate_limited"
    assert int(answer.headers["retry-after"]) >= 1
    for word in words:
        assert word in answer.json()["error"]


def test_requests_per_minute_hold_across_servers(servers: tuple[LiveServer, LiveServer]) -> None:
    limit(servers[0], requests_per_minute=3)
    for number in range(3):
        answer = ask(servers[number % 2])
        assert answer.status_code == httpx.codes.OK
        assert answer.headers["x-ratelimit-limit-requests"] == "3"
        assert answer.headers["x-ratelimit-remaining-requests"] == str(2 - number)
        assert 59 < float(answer.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 61
        assert "x-ratelimit-limit-tokens" not in answer.headers
    for server in servers:
        answer = ask(server)
        assert_refused(answer, "requests_per_minute is 3", "'default'")
        assert 55 <= int(answer.headers["retry-after"]) <= 61
        assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    limit(servers[1])
    assert "x-ratelimit-limit-requests" not in ask(servers[0]).headers


def test_tokens_are_held_at_first_and_counted_at_the_end(
    servers: tuple[LiveServer, LiveServer],
) -> None:
    limit(servers[0], tokens_per_minute=100)
    prompt_tokens = 1
    answer = ask(servers[0], max_new_tokens=49)
    assert answer.headers["x-ratelimit-limit-tokens"] == "100"
    assert answer.headers["x-ratelimit-remaining-tokens"] == str(100 - prompt_tokens - 49)
    assert_refused(ask(servers[1], max_new_tokens=50), "tokens_per_minute is 100", "51")
    # A stop string ends this one after a token; what it held beyond that is free at once.
    text = servers[0].generate("Hi", max_new_tokens=1)["generated_text"]
    answer = ask(servers[1], max_new_tokens=40, stop=[text])
    left = 100 - 50 - 2
    assert answer.headers["x-ratelimit-remaining-tokens"] == str(left - 41)
    answer = ask(servers[0], max_new_tokens=40)
    assert answer.headers["x-ratelimit-remaining-tokens"] == str(left - 2 - 41)


def test_a_stream_that_is_cut_counts_what_it_generated(
    servers: tuple[LiveServer, LiveServer],
) -> None:
    limit(servers[0], tokens_per_minute=MAX_LENGTH)
    with running(servers[0]):
        assert_refused(ask(servers[1], max_new_tokens=200))
    deadline = time.monotonic() + DEADLINE_SECONDS
    while int(ask(servers[1]).headers["x-ratelimit-remaining-tokens"]) < MAX_LENGTH // 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_sequences_under_way_hold_across_servers(servers: tuple[LiveServer, LiveServer]) -> None:
    limit(servers[0], concurrent_requests=1)
    for _ in range(3):  # a client that asks again as soon as it has its answer
        assert ask(servers[0]).status_code == httpx.codes.OK
        assert ask(servers[1]).status_code == httpx.codes.OK
    with running(servers[0]):
        refused = ask(servers[1])
        assert_refused(refused, "concurrent_requests is 1")
        told = {name: refused.headers[f"x-ratelimit-{name}-concurrent-requests"] for name in TOLD}
        assert told == {"limit": "1", "remaining": "0", "reset": "1.000s"}
        assert_refused(ask(servers[0]))
    until_allowed(servers[1])
    never = ask(servers[0], ["Hi", "there"])
    assert never.status_code == httpx.codes.UNPROCESSABLE_ENTITY
    assert "can never begin" in never.json()["error"]


def test_sequences_that_wait_are_bounded(servers: tuple[LiveServer, LiveServer]) -> None:
    limit(servers[0], queued_requests=1)
    with ThreadPoolExecutor(1) as pool:
        with ExitStack() as stack:
            for _ in range(SLOTS):
                stack.enter_context(running(servers[0]))
            waiting = pool.submit(ask, servers[0])
            servers[0].wait_until("waiting_requests", 1)
            for server in servers:
                assert_refused(ask(server), "queued_requests is 1")
        assert waiting.result().status_code == httpx.codes.OK
    answer = ask(servers[1])
    assert answer.status_code == httpx.codes.OK
    assert answer.headers["x-ratelimit-limit-queued-requests"] == "1"
    assert answer.headers["x-ratelimit-remaining-queued-requests"] == "0"
    assert "x-ratelimit-reset-queued-requests" not in answer.headers


def test_max_new_tokens_is_bounded(servers: tuple[LiveServer, LiveServer]) -> None:
    limit(servers[0], max_new_tokens=5)
    assert ask(servers[1], max_new_tokens=5).status_code == httpx.codes.OK
    answer = ask(servers[1], max_new_tokens=6)
    assert answer.status_code == httpx.codes.UNPROCESSABLE_ENTITY
    assert "expected at most 5" in answer.json()["error"]
    found = servers[1].client.post(
        "/generate", json={"inputs": "Hi", "parameters": {"details": True}}
    )
    assert found.json()["details"]["generated_tokens"] == 5


def test_limits_as_set_and_as_they_hold(endless: LoadedModel, tmp_path: Path) -> None:
    flags = ["--limit-requests-per-minute", "60", "--limit-stored-bytes", "1MiB"]
    with live_server(endless, tmp_path, *flags) as server:
        default = server.client.get(LIMITS).json()
        assert default["limits"] == {}
        assert default["effective"]["requests_per_minute"] == 60
        assert default["effective"]["stored_bytes"] == 2**20
        assert default["effective"]["weight"] == 1.0
        limit(server, requests_per_minute=None, weight=3)
        found = server.client.get(LIMITS).json()
        assert found["limits"] == {"requests_per_minute": None, "weight": 3}
        assert found["effective"]["requests_per_minute"] is None
        assert found["effective"]["stored_bytes"] == 2**20
        assert server.client.get("/admin/limits").json() == [found]
        limit(server)
        assert server.client.get(LIMITS).json() == default
        assert server.client.get("/admin/limits").json() == []


@pytest.mark.parametrize(
    ("path", "body", "word"),
    [
        (LIMITS, {"requests_per_minute": 0}, "requests_per_minute"),
        (LIMITS, {"requests_per_minute": 1.5}, "requests_per_minute"),
        (LIMITS, {"tokens_per_minute": "9"}, "tokens_per_minute"),
        (LIMITS, {"tokens_per_minute": 2**60}, "tokens_per_minute"),
        (LIMITS, {"weight": 0}, "weight"),
        (LIMITS, {"speed": 1}, "speed"),
        ("/admin/tenants/No_Such/limits", {}, "tenant"),
        ("/admin/tenants/default/keys/k1/limits", {"tasks": 1}, "tasks"),
        ("/admin/tenants/default/keys/k%2F1/limits", {}, "no such page"),
    ],
)
def test_limits_that_are_none(
    servers: tuple[LiveServer, LiveServer], path: str, body: dict[str, Any], word: str
) -> None:
    before = servers[0].client.get(LIMITS).json()
    answer = servers[0].client.put(path, json=body)
    assert answer.status_code in (404, 422), answer.text
    assert word in answer.json()["error"]
    assert servers[0].client.get(LIMITS).json() == before


async def test_without_the_store_limits_go_on(
    endless: LoadedModel, valkey: EmbeddedValkey, tmp_path: Path
) -> None:
    with live_server(endless, tmp_path, "--redis-url", valkey.url) as server:
        limit(server, requests_per_minute=2)
        assert ask(server).status_code == httpx.codes.OK
        await valkey.stop()
        try:
            assert ask(server).status_code == httpx.codes.OK
            assert_refused(ask(server), "requests_per_minute is 2")
        finally:
            await valkey.start()
