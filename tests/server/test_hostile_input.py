"""Bodies made to hurt are refused, and a stream that runs beside them goes on as if alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.server.live import LiveServer

JSON = {"Content-Type": "application/json"}
STREAMED = {"max_new_tokens": 1500}
DEEP = 100_000
NESTED = b"[" * DEEP + b"]" * DEEP
SCHEMA = b'{"items":' * DEEP + b"{}" + b"}" * DEEP
MEGABYTE = b" " * 2**20
HUNDRED_MEGABYTES = 100


def unending() -> Iterator[bytes]:
    """100 MB of one JSON text, whose length no header tells."""
    yield b'{"inputs": "'
    for _ in range(HUNDRED_MEGABYTES):
        yield MEGABYTE
    yield b'"}'


def status_of(server: LiveServer, method: str, path: str, content: bytes) -> int:
    answer = server.client.request(method, path, content=content, headers=JSON)
    said = answer.json()["error"]
    assert len(str(said)) < 1000, "it does not tell all of it back"
    return answer.status_code


BODIES = [
    ("POST", "/generate", b'{"inputs": ' + NESTED + b"}", 400),
    ("POST", "/v1/completions", b'{"model": "x", "prompt": ' + NESTED + b"}", 400),
    ("POST", "/v1/batches", NESTED, 400),
    ("POST", "/admin/keys", NESTED, 400),
    ("PUT", "/admin/tasks/x", b'{"text": ' + NESTED + b"}", 422),  # read by pydantic
    (
        "POST",
        "/generate",
        b'{"inputs": "x", "parameters": {"grammar": {"type": "json", "value": '
        + json.dumps(SCHEMA[:60_000].decode()).encode()
        + b"}}}",
        422,
    ),
    (
        "POST",
        "/v1/chat/completions",
        b'{"model": "short", "messages": [{"role": "user", "content": "x"}], "response_format": '
        b'{"type": "json_schema", "json_schema": {"name": "x", "schema": ' + SCHEMA + b"}}}",
        400,
    ),
    ("POST", "/generate", b'{"inputs": "\xff\xfe"}', 400),
    ("POST", "/v1/completions", b'{"model": "short", "prompt": "\xc3\x28"}', 400),
    ("PUT", "/admin/tasks/x", b'{"text": "\xed\xa0\x80"}', 422),
    ("POST", "/generate", b'{"inputs": "x", "parameters": {"seed": ' + b"9" * 10_000 + b"}}", 400),
]
LARGE = [("POST", "/generate"), ("POST", "/v1/completions"), ("PUT", "/admin/tasks/x")]


@pytest.fixture(scope="module")
def alone(server: LiveServer) -> list[int]:
    """The stream's tokens with nothing beside it."""
    return tokens(server)


def tokens(server: LiveServer) -> list[int]:
    events = server.stream("Once", "middle", **STREAMED)
    return [event["token"]["id"] for event in events]


def send_all(server: LiveServer) -> None:
    for method, path, content, status in BODIES:
        assert status_of(server, method, path, content) == status, content[:80]
    large = b'{"inputs": "' + MEGABYTE * HUNDRED_MEGABYTES + b'"}'
    for method, path in LARGE:
        assert status_of(server, method, path, large) == 413, path


def test_a_stream_beside_hostile_bodies_is_undisturbed(
    server: LiveServer, alone: list[int]
) -> None:
    assert len(alone) == STREAMED["max_new_tokens"]
    with ThreadPoolExecutor(1) as thread:
        beside = thread.submit(tokens, server)
        server.wait_until("running_requests", 1)
        send_all(server)
        while not beside.done():
            send_all(server)
        assert beside.result() == alone
    assert server.client.get("/admin/tasks/x").status_code == 404, "nothing of it is kept"


def test_a_body_that_does_not_say_its_length_is_cut_off(server: LiveServer) -> None:
    answer = server.client.post("/generate", content=unending(), headers=JSON)
    assert answer.status_code == httpx.codes.REQUEST_ENTITY_TOO_LARGE
