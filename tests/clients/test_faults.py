"""What the clients do when the server refuses, stalls or breaks off."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import httpx
import pytest
import tenacity

import clients
from clients import Client
from clients._errors import status_error_class
from clients._retry import MAX_WAIT_SECONDS, retry_options
from tests.clients import faulty_server as faulty
from tests.clients.blocking import blocking_client
from tests.clients.faulty_server import FaultyServer, answer, refuse

USED = {"task_id": None, "version": None, "prefix_tokens": 0, "prompt_tokens": 1}
DETAILS = {**USED, "finish_reason": "length", "generated_tokens": 1, "seed": None}
TEXT = {**USED, "generated_text": "hello", "details": {**DETAILS, "tokens": []}}
TOKEN = {"index": 1, "token": {"id": 1, "text": "a", "logprob": -0.5, "special": False}}
LAST = {**TOKEN, "generated_text": "a", "details": DETAILS}
TASK = {
    "task_id": "t",
    "version": "sha256:0",
    "prefix_length": 1,
    "bytes": 256_000,
    "method": "text",
    "base_model": "",
    "template": "",
    "created_at": 0.5,
}
OK = answer(200, TEXT)


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries come at once, unless the server asks for a wait."""
    monkeypatch.setattr("clients._retry._backoff", tenacity.wait_none())


@pytest.fixture(scope="module")
def running() -> Iterator[FaultyServer]:
    with faulty.faulty_server() as server:
        yield server


@pytest.fixture
def server(running: FaultyServer) -> FaultyServer:
    running.requests.clear()
    return running


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
def client(kind: str, server: FaultyServer) -> Iterator[Client]:
    with blocking_client(kind, server.url, timeout=10) as client:
        yield client


@pytest.mark.parametrize(
    "fault", [refuse(429, retry_after="0"), refuse(429), refuse(503), faulty.drop]
)
def test_a_passing_fault_is_retried(
    client: Client, server: FaultyServer, fault: faulty.Step
) -> None:
    server.script(fault, fault, OK)
    assert client.generate("hi").generated_text == "hello"
    bodies = [body for _, _, _, body in server.requests]
    assert len(bodies) == 3
    assert bodies[0] == bodies[1] == bodies[2]


def test_retries_are_bounded(client: Client, server: FaultyServer) -> None:
    server.script(*[refuse(429, "the queue is full", "overloaded", retry_after="0")] * 10)
    with pytest.raises(clients.QueueFullError, match="the queue is full") as caught:
        client.generate("hi")
    assert len(server.requests) == 4
    assert caught.value.status_code == 429
    assert caught.value.error_type == "overloaded"
    assert caught.value.retry_after == 0


def test_a_wait_that_is_too_long_is_left_to_the_caller(
    client: Client, server: FaultyServer
) -> None:
    server.script(refuse(503, retry_after="3600"), OK)
    with pytest.raises(clients.UnavailableError) as caught:
        client.generate("hi")
    assert caught.value.retry_after == 3600
    assert len(server.requests) == 1


def test_retry_after_may_be_a_date(client: Client, server: FaultyServer) -> None:
    in_an_hour = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    server.script(refuse(429, retry_after=in_an_hour))
    with pytest.raises(clients.QueueFullError) as caught:
        client.tasks()
    assert caught.value.retry_after is not None
    assert 3000 < caught.value.retry_after <= 3600


@pytest.mark.parametrize(("asked", "least"), [(None, 0.0), (7.0, 7.0), (MAX_WAIT_SECONDS, 30.0)])
def test_the_wait_is_at_least_what_the_server_asks(asked: float | None, least: float) -> None:
    options = retry_options(3)
    state = tenacity.RetryCallState(tenacity.Retrying(**options), None, (), {})
    error = clients.QueueFullError("full", 429, retry_after=asked)
    state.set_exception((type(error), error, None))
    assert options["wait"](state) == least
    assert options["retry"](state)


@pytest.mark.parametrize("status", [400, 404, 422, 413, 500])
def test_what_the_client_did_wrong_is_not_retried(
    client: Client, server: FaultyServer, status: int
) -> None:
    server.script(refuse(status, "because"), OK)
    with pytest.raises(status_error_class(status), match="because") as caught:
        client.generate("hi")
    assert type(caught.value) is status_error_class(status)
    assert len(server.requests) == 1


def test_an_answer_that_breaks_off_is_not_asked_again(client: Client, server: FaultyServer) -> None:
    server.script(faulty.truncated(200), OK)
    with pytest.raises(clients.APIConnectionError, match="broke off"):
        client.generate("hi")
    assert len(server.requests) == 1


def test_a_slow_answer_times_out_and_is_not_asked_again(kind: str, server: FaultyServer) -> None:
    server.script(server.stall)
    with (
        blocking_client(kind, server.url, timeout=0.05) as client,
        pytest.raises(clients.APITimeoutError, match="in time"),
    ):
        client.generate("hi")
    assert len(server.requests) == 1


def test_nobody_listens(kind: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with (
            blocking_client(kind, url) as client,
            pytest.raises(clients.APIConnectionError, match=f"cannot connect to {url}"),
        ):
            client.tasks()


@pytest.mark.parametrize("status", [200, 307, 404, 502])
def test_a_server_that_is_not_ours(client: Client, server: FaultyServer, status: int) -> None:
    server.script(faulty.page(status))
    with pytest.raises(clients.APIResponseError, match="prefixserve"):
        client.tasks()


def test_an_answer_that_lacks_a_field(client: Client, server: FaultyServer) -> None:
    server.script(answer(200, {"details": None}))
    with pytest.raises(clients.APIResponseError, match="generated_text"):
        client.generate("hi")


def test_a_stream_is_retried_until_it_begins(client: Client, server: FaultyServer) -> None:
    server.script(refuse(429), faulty.drop, faulty.events(TOKEN, LAST, after=b": bye\n\n"))
    tokens = list(client.stream("hi"))
    assert [token.token.text for token in tokens] == ["a", "a"]
    assert [token.generated_text for token in tokens] == [None, "a"]
    assert len(server.requests) == 3


BROKEN_STREAMS = [
    (faulty.events(TOKEN), clients.APIConnectionError, "before the last token"),
    (faulty.events(TOKEN, after=b"data: {\n\n"), clients.APIResponseError, "prefixserve"),
    (faulty.events(TOKEN, {"error": "it broke", "error_type": "generation"}),
     clients.GenerationError, "it broke"),
    (faulty.events(TOKEN, {**TOKEN, "token": 5}), clients.APIResponseError, "token"),
]  # fmt: skip


@pytest.mark.parametrize(("stream", "error", "message"), BROKEN_STREAMS)
def test_a_broken_stream_is_not_asked_again(
    client: Client, server: FaultyServer, stream: faulty.Step, error: type[Exception], message: str
) -> None:
    server.script(stream, faulty.events(LAST))
    tokens = client.stream("hi")
    assert next(tokens).token.text == "a"
    with pytest.raises(error, match=message):
        next(tokens)
    assert len(server.requests) == 1


def test_json_where_a_stream_was_asked_for(client: Client, server: FaultyServer) -> None:
    server.script(OK)
    with pytest.raises(clients.APIResponseError, match="stream"):
        list(client.stream("hi"))


def test_an_upload_is_sent_again_whole(
    client: Client, server: FaultyServer, tmp_path: Path
) -> None:
    path = tmp_path / "prefix.safetensors"
    path.write_bytes(bytes(range(256)) * 1000)
    server.script(refuse(503), answer(201, TASK))
    sent: list[tuple[int, int]] = []
    assert client.upload("t", path, progress=lambda *now: sent.append(now)).task_id == "t"
    (_, _, headers, first), (_, _, _, second) = server.requests
    assert path.read_bytes() in first
    assert first == second
    total = int(headers["content-length"])
    assert {of for _, of in sent} == {total}
    assert [now for now, _ in sent].count(total) == 2
    assert len([now for now, _ in sent if 0 < now < total]) > 4


def test_health_is_asked_once(client: Client, server: FaultyServer) -> None:
    server.script(refuse(503, "the store is down"), answer(200, {}))
    assert client.health() == clients.Health(ready=False, reason="the store is down")
    assert client.health() == clients.Health(ready=True)


def test_an_interrupted_download_leaves_nothing(
    client: Client, server: FaultyServer, tmp_path: Path
) -> None:
    server.script(faulty.truncated(200), answer(200, "bytes"))
    with pytest.raises(clients.APIConnectionError):
        client.download("t", tmp_path / "x")
    with pytest.raises(clients.PrefixFileError, match="cannot write"):
        client.download("t", tmp_path / "missing" / "x")
    assert list(tmp_path.iterdir()) == []


def test_the_key_is_sent(kind: str, server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFIXSERVE_URL", server.url)
    monkeypatch.setenv("PREFIXSERVE_API_KEY", "from-environment")
    server.script(answer(200, []), answer(200, []))
    with blocking_client(kind) as client:
        client.tasks()
    with blocking_client(kind, api_key="given") as client:
        client.tasks()
    keys = [headers["authorization"] for _, _, headers, _ in server.requests]
    assert keys == ["Bearer from-environment", "Bearer given"]


@pytest.mark.parametrize("url", ["localhost:8000", "http://", "ftp://x", "/generate"])
def test_what_is_no_address(kind: str, url: str) -> None:
    with (
        pytest.raises(clients.InvalidArgumentError, match=url),
        blocking_client(kind, url),
    ):
        pass


def test_what_cannot_be_sent(client: Client, kind: str, server: FaultyServer) -> None:
    with pytest.raises(clients.InvalidArgumentError, match="JSON"):
        client.generate("half a character: \ud83d")
    with pytest.raises(clients.InvalidArgumentError, match="JSON"):
        client.generate("hi", temperature=float("nan"))
    with (
        pytest.raises(clients.InvalidArgumentError, match="API key"),
        blocking_client(kind, server.url, api_key="key\n"),
    ):
        pass
    assert server.requests == []


def test_a_task_id_cannot_leave_its_place_in_the_address(
    client: Client, server: FaultyServer
) -> None:
    server.script(refuse(404))
    with pytest.raises(clients.UnknownTaskError):
        client.task("../x?y#z")
    assert server.requests[0][1] == "/admin/tasks/..%2Fx%3Fy%23z"


def test_retries_are_logged(
    client: Client, server: FaultyServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.script(refuse(429, "the queue is full"), OK)
    with caplog.at_level(logging.INFO, "prefixserve.clients"):
        client.generate("hi")
    assert "the queue is full" in caplog.text


def test_every_error_is_in_the_tree() -> None:
    errors = [vars(clients)[name] for name in clients.__all__ if name.endswith("Error")]
    assert len(errors) == 22
    assert all(issubclass(error, clients.PrefixServeError) for error in errors)
    assert not any(issubclass(error, httpx.HTTPError) for error in errors)
