"""Usage equals what clients were told, to the token."""

from __future__ import annotations

import csv
import io
import json
import logging
import random
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from httpx_sse import connect_sse

from prefix_store.embedded import EmbeddedValkey
from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix
from server.logs import REQUESTS
from tests.server.conftest import MAX_LENGTH
from tests.server.live import LiveServer, live_server
from tests.server.test_replicas import until

CLIENTS = 32
CALLS = 4
QUANTITIES = ("sequences", "prompt_tokens", "prefix_tokens", "generated_tokens")
TOO_MANY = MAX_LENGTH - 100
"""Tokens of a request that is stopped long before."""


@dataclass(frozen=True)
class Told:
    """What a client was told by one call; `is_cut` when it went before the end."""

    request_id: str
    task_id: str | None
    sequences: int
    prompt_tokens: int
    prefix_tokens: int
    generated_tokens: int
    is_cut: bool = False


@pytest_asyncio.fixture
async def valkey(tmp_path: Path) -> Any:
    async with EmbeddedValkey(tmp_path / "external") as valkey:
        yield valkey


@pytest.fixture
def servers(
    valkey: EmbeddedValkey, endless: LoadedModel, prefixes: dict[str, Prefix], tmp_path: Path
) -> Iterator[tuple[LiveServer, LiveServer]]:
    flags = ["--redis-url", valkey.url, "--max-slots", "8", "--max-length", str(MAX_LENGTH)]
    with (
        live_server(endless, tmp_path / "a", *flags) as first,
        live_server(endless, tmp_path / "b", *flags) as second,
    ):
        for task_id, prefix in prefixes.items():
            first.upload(task_id, prefix)
        yield first, second


def test_usage_equals_what_clients_were_told(
    servers: tuple[LiveServer, LiveServer], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, REQUESTS)
    seeds = iter(range(CLIENTS))
    lock = threading.Lock()

    def client(_: int) -> list[Told]:
        with lock:
            chosen = random.Random(next(seeds))
        with httpx.Client(timeout=60) as http:
            return [told for _ in range(CALLS) for told in call(http, chosen, servers)]

    with ThreadPoolExecutor(CLIENTS) as pool:
        told = [one for found in pool.map(client, range(CLIENTS)) for one in found]
    assert any(one.is_cut for one in told)
    assert any(not one.is_cut and one.task_id is None for one in told)
    # Its line in the log is the last thing that a request does, after its client has gone.
    until(lambda: {one.request_id for one in told} <= facts_logged(caplog).keys(), True)
    logged = facts_logged(caplog)
    counted = {kind: Counter[str | None]() for kind in QUANTITIES}
    for one in told:
        line = logged[one.request_id]
        for kind in QUANTITIES:
            counted[kind][one.task_id] += line[kind]
            if not one.is_cut or kind != "generated_tokens":
                assert line[kind] == getattr(one, kind), (one, line)
        # Of a cut stream, what was on its way when its client went is counted.
        assert one.generated_tokens <= line["generated_tokens"] < TOO_MANY
    found = used(servers)
    assert found.keys() == {one.task_id for one in told}
    for task_id, row in found.items():
        assert {kind: row[kind] for kind in QUANTITIES} == {
            kind: counts[task_id] for kind, counts in counted.items()
        }
    metrics = Counter[str]()
    for server in servers:
        for kind in ("prompt", "prefix", "generated"):
            metrics[kind] += int(server.metric("tenant_tokens_total", tenant="default", kind=kind))
    for kind, count in metrics.items():
        assert count == sum(row[f"{kind}_tokens"] for row in found.values())


def facts_logged(caplog: pytest.LogCaptureFixture) -> dict[str, dict[str, Any]]:
    """What the log says of each request that has ended."""
    lines = [vars(record) for record in caplog.records if record.name == REQUESTS]
    return {line["request_id"]: line["facts"] for line in lines}


def used(servers: tuple[LiveServer, LiveServer]) -> dict[str | None, dict[str, Any]]:
    """Rows by task; each server sends what it counted before it answers."""
    servers[0].client.get("/admin/usage")
    rows = servers[1].client.get("/admin/usage").json()
    assert {row["tenant"] for row in rows} == {"default"}
    return {row["task_id"]: row for row in rows}


def call(
    http: httpx.Client, chosen: random.Random, servers: tuple[LiveServer, LiveServer]
) -> list[Told]:
    """One call of any kind to either server; to know a cut stream's prompt, a whole one before."""
    url = chosen.choice(servers).url
    task_id = chosen.choice([None, "short", "middle", "long"])
    text = " ".join(["Hi"] * chosen.randint(1, 4))
    parameters = {"max_new_tokens": chosen.randint(1, 30), "details": True}
    body: dict[str, Any] = {"task_id": task_id, "inputs": text, "parameters": parameters}
    match chosen.choice(["whole", "several", "stream", "cut"]):
        case "several":
            body["inputs"] = [text, f"{text} Hi", text]
            answer = http.post(f"{url}/generate", json=body)
            return [told_of(answer, [one["details"] for one in answer.json()])]
        case "stream":
            with connect_sse(http, "POST", f"{url}/generate_stream", json=body) as source:
                events = [json.loads(event.data) for event in source.iter_sse()]
            told = told_of(source.response, [events[-1]["details"]])
            assert len(events) == told.generated_tokens
            return [told]
        case kind:
            answer = http.post(f"{url}/generate", json=body)
            whole = told_of(answer, [answer.json()["details"]])
            if kind == "whole":
                return [whole]
    parameters["max_new_tokens"] = TOO_MANY
    request_id = f"cut-{chosen.getrandbits(64)}"
    generated = cut_stream(httpx.URL(url), body, request_id, after=chosen.randint(1, 20))
    return [
        whole,
        replace(whole, request_id=request_id, generated_tokens=generated, is_cut=True),
    ]


def told_of(answer: httpx.Response, details: list[dict[str, Any]]) -> Told:
    return Told(
        answer.headers["x-request-id"],
        details[0]["task_id"],
        len(details),
        *(sum(one[kind] for one in details) for kind in QUANTITIES[1:]),
    )


def cut_stream(url: httpx.URL, body: dict[str, Any], request_id: str, after: int) -> int:
    """Stop after some events, but read all that the server sent until it noticed; how many."""
    with asking(url.join("/generate_stream"), body, f"X-Request-Id: {request_id}") as connection:
        received = b""
        while received.count(b"data:") < after:
            received += connection.recv(65536)
        connection.shutdown(socket.SHUT_WR)
        while more := connection.recv(65536):
            received += more
    return received.count(b"data:")


@contextmanager
def asking(
    url: httpx.URL, body: dict[str, Any], header: str = "Accept: */*"
) -> Iterator[socket.socket]:
    """A connection on which a call was made; its client goes on the way out."""
    text = json.dumps(body)
    head = f"POST {url.path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(text)}\r\n"
    with socket.create_connection((url.host, url.port or 80), timeout=60) as connection:
        head += f"{header}\r\nContent-Type: application/json\r\n\r\n"
        connection.sendall(f"{head}{text}".encode())
        yield connection


def test_a_cut_answer_counts_what_was_generated(server: LiveServer) -> None:
    """Of a whole answer that nobody waits for, its client is told nothing."""
    before = generated_by(server)
    body = {"inputs": "Hi", "parameters": {"max_new_tokens": TOO_MANY}}
    with asking(httpx.URL(server.url).join("/generate"), body):
        until(lambda: generated_by(server) > before, True)
    server.wait_until("running_requests", 0)
    assert generated_by(server) - before < TOO_MANY
    assert generated_by(server) == server.metric("generated_tokens_total", task="base")


def generated_by(server: LiveServer) -> int:
    """Tokens that the bare base model generated."""
    rows = server.client.get("/admin/usage").json()
    return sum(row["generated_tokens"] for row in rows if row["task_id"] is None)


def test_usage_as_csv(server: LiveServer) -> None:
    server.generate("Hi", "short", max_new_tokens=3)
    server.generate("Hi", max_new_tokens=3)
    rows = server.client.get("/admin/usage").json()
    asked = [
        server.client.get("/admin/usage", params={"format": "csv"}),
        server.client.get("/admin/usage", headers={"Accept": "text/csv"}),
    ]
    for answer in asked:
        assert answer.headers["content-type"].startswith("text/csv")
        found = list(csv.DictReader(io.StringIO(answer.text)))
        assert [{**row, "task_id": row["task_id"] or None} for row in found] == [
            {name: value if value is None else str(value) for name, value in row.items()}
            for row in rows
        ]


def test_usage_is_filtered(server: LiveServer) -> None:
    def asked(**params: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = server.client.get("/admin/usage", params=params).json()
        return rows

    server.generate("Hi", "short", max_new_tokens=3)
    day = asked()[0]["day"]
    assert {row["task_id"] for row in asked(task="short")} == {"short"}
    assert asked(tenant="nobody") == []
    assert asked(**{"from": day, "to": day}) == asked()
    assert asked(**{"to": "2020-01-01"}) == []


@pytest.mark.parametrize(
    ("params", "word"),
    [
        ({"from": "2026-02-02", "to": "2026-02-01"}, "expected 1 to 400"),
        ({"from": "2020-02-02", "to": "2026-02-01"}, "expected 1 to 400"),
        ({"from": "0001-01-01"}, "from"),
        ({"to": "9999-12-31"}, "to"),
        ({"from": "yesterday"}, "from"),
        ({"format": "xml"}, "format"),
    ],
)
def test_usage_that_cannot_be(server: LiveServer, params: dict[str, str], word: str) -> None:
    answer = server.client.get("/admin/usage", params=params)
    assert answer.status_code == httpx.codes.UNPROCESSABLE_ENTITY, answer.text
    assert word in answer.json()["error"]
