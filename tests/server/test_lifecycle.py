"""Clients that go away, a store that goes away, and the way from start to exit."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from httpx_sse import ServerSentEvent, connect_sse

from prefix_store.embedded import EmbeddedValkey
from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix
from server.serve import main
from tests.server.conftest import MAX_LENGTH
from tests.server.live import LiveServer, live_server
from tests.server_process import ServerProcess, running_server

ENDLESS: dict[str, Any] = {"inputs": "Hello", "parameters": {"max_new_tokens": MAX_LENGTH - 100}}


@pytest.mark.parametrize("task_id", [None, "middle"])
def test_a_stream_that_is_closed_frees_its_slot(server: LiveServer, task_id: str | None) -> None:
    label = task_id or "base"
    gone = server.metric("requests_total", task=label, status="499")
    before = server.metric("generated_tokens_total", task=label)
    body = {**ENDLESS, "task_id": task_id}
    with connect_sse(server.client, "POST", "/generate_stream", json=body) as source:
        events = source.iter_sse()
        next(events)
        assert server.metric("running_requests") == 1
    server.wait_until("running_requests", 0)
    server.wait_until("requests_total", gone + 1, task=label, status="499")
    assert server.metric("generated_tokens_total", task=label) < before + MAX_LENGTH - 100


@pytest.mark.parametrize("inputs", ["Hello", ["Hello", "there"]])
def test_a_client_that_does_not_wait_frees_its_slots(
    server: LiveServer, inputs: str | list[str]
) -> None:
    count = 1 if isinstance(inputs, str) else len(inputs)
    gone = server.metric("requests_total", task="base", status="499")
    body = json.dumps({**ENDLESS, "inputs": inputs})
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    address = httpx.URL(server.url)
    with socket.create_connection((address.host, address.port or 80)) as connection:
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n{body}".encode())
        server.wait_until("running_requests", count)
    server.wait_until("running_requests", 0)
    server.wait_until("requests_total", gone + 1, task="base", status="499")


def test_a_client_that_reads_nothing_holds_nobody_up(server: LiveServer) -> None:
    body = json.dumps({**ENDLESS, "parameters": {"max_new_tokens": 1000, "top_n_tokens": 20}})
    head = f"POST /generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    address = httpx.URL(server.url)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((address.host, address.port))
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n{body}".encode())
        server.wait_until("running_requests", 1)
        assert len(server.stream("Hello", max_new_tokens=20)) == 20
        server.wait_until("running_requests", 0)  # it runs to its end without being read


def test_a_restart_of_server_and_store_keeps_every_task(
    endless: LoadedModel, prefixes: dict[str, Prefix], tmp_path: Path
) -> None:
    with live_server(endless, tmp_path) as server:
        for task_id, prefix in prefixes.items():
            server.upload(task_id, prefix)
        tasks = server.client.get("/admin/tasks").json()
        before = server.generate("Hello", "middle", max_new_tokens=4)
    with live_server(endless, tmp_path) as server:
        assert server.client.get("/admin/tasks").json() == tasks
        assert server.generate("Hello", "middle", max_new_tokens=4) == before


def terminate(server: ServerProcess) -> None:
    server.process.send_signal(signal.SIGTERM)


def press_ctrl_c(server: ServerProcess) -> None:
    """A terminal tells every process that the command has started, and theirs."""
    os.killpg(server.process.pid, signal.SIGINT)


@pytest.mark.parametrize("end", [terminate, press_ctrl_c])
def test_a_signal_lets_what_runs_finish_refuses_the_rest_and_exits_0(
    endless_dir: Path, tmp_path: Path, end: Callable[[ServerProcess], None]
) -> None:
    flags = ["--no-demo-tasks", "--max-length", str(MAX_LENGTH), "--drain-seconds", "60"]
    body = {"inputs": "Hello", "parameters": {"max_new_tokens": 2500}}
    with (
        running_server(endless_dir, tmp_path, *flags) as server,
        httpx.Client(base_url=server.url, timeout=60, headers=server.headers) as client,
        connect_sse(client, "POST", "/generate_stream", json=body) as source,
    ):
        events = source.iter_sse()
        next(events)
        end(server)
        while (ready := client.get("/health/ready")).status_code == httpx.codes.OK:
            pass
        assert (ready.status_code, ready.json()["error_type"]) == (503, "draining")
        refused = client.post("/generate", json={"inputs": "Hello"})
        assert (refused.status_code, refused.json()["error_type"]) == (503, "draining")
        assert "retry-after" in refused.headers
        assert client.get("/health/live").status_code == httpx.codes.OK
        rest = [json.loads(event.data) for event in events]
        assert rest[-1]["details"]["generated_tokens"] == 2500
        assert server.process.wait(60) == 0
    log = server.log.read_text()
    assert "Traceback" not in log
    assert "the store does not answer" not in log


def test_at_the_deadline_what_runs_is_told(endless: LoadedModel, tmp_path: Path) -> None:
    flags = ["--max-length", str(MAX_LENGTH), "--drain-seconds", "0"]
    with live_server(endless, tmp_path, *flags) as server, ThreadPoolExecutor(1) as thread:
        whole = thread.submit(server.client.post, "/generate", json=ENDLESS)
        streamed = _endless_events(server)
        next(streamed)
        server.wait_until("running_requests", 2)
        server.stop()
        last = [json.loads(event.data) for event in streamed][-1]
        assert last["error_type"] == "draining"
        answer = whole.result()
        assert (answer.status_code, answer.json()["error_type"]) == (503, "draining")


def _endless_events(server: LiveServer) -> Iterator[ServerSentEvent]:
    """The events of an endless stream."""
    with connect_sse(server.client, "POST", "/generate_stream", json=ENDLESS) as source:
        yield from source.iter_sse()


async def test_without_the_store_loaded_tasks_go_on_and_others_are_503(
    endless: LoadedModel, prefixes: dict[str, Prefix], tmp_path: Path
) -> None:
    valkey = EmbeddedValkey(tmp_path / "external")
    await valkey.start()
    try:
        flags = ["--redis-url", valkey.url, "--store-timeout-seconds", "2"]
        with live_server(endless, tmp_path, *flags) as server:
            for task_id, prefix in prefixes.items():
                server.upload(task_id, prefix)
            before = server.generate("Hello", "short", max_new_tokens=4)
            await valkey.stop()
            assert server.generate("Hello", "short", max_new_tokens=4) == before
            assert server.generate("Hello", max_new_tokens=4)["task_id"] is None
            _assert_unavailable(server, prefixes["short"])
            assert server.metric("store_errors_total") > 0
            assert server.client.get("/health/ready").status_code == httpx.codes.OK
            await valkey.start()
            assert server.generate("Hello", "long", max_new_tokens=4)["prefix_tokens"] == 21
    finally:
        await valkey.stop()


def _assert_unavailable(server: LiveServer, prefix: Prefix) -> None:
    requests: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", "/generate", {"json": {"inputs": "Hello", "task_id": "middle"}}),
        ("POST", "/generate_stream", {"json": {"inputs": "Hello", "task_id": "nobody"}}),
        ("GET", "/admin/tasks", {}),
        ("GET", "/admin/tasks/short", {}),
        ("PUT", "/admin/tasks/new", {"files": {"file": prefix.to_bytes()}}),
        ("DELETE", "/admin/tasks/short", {}),
    ]
    for method, path, body in requests:
        answer = server.client.request(method, path, **body)
        found = answer.status_code, answer.json()["error_type"], "retry-after" in answer.headers
        assert found == (503, "unavailable", True), (method, path, answer.text)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "/nowhere/model"], "/nowhere/model"),
        (["--device", "abacus"], "abacus"),
        (["--redis-url", "redis://127.0.0.1:1/0"], "127.0.0.1:1"),
        (["--port", "{taken}"], "--port"),
        (["--host", "256.0.0.1"], "--host"),
        (["--max-slots", "none"], "--max-slots"),
    ],
)
def test_a_server_that_cannot_start_says_why_in_a_sentence(
    endless_dir: Path, tmp_path: Path, flags: list[str], words: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert words in _refusal(endless_dir, tmp_path, *(f.format(taken=port) for f in flags))


def test_a_data_directory_has_one_server(
    endless: LoadedModel, endless_dir: Path, tmp_path: Path
) -> None:
    with live_server(endless, tmp_path):
        assert "another server" in _refusal(endless_dir, tmp_path)


def _refusal(model: Path, data_dir: Path, *flags: str) -> str:
    """What the command says when it cannot start."""
    argv = ["--model", str(model), "--data-dir", str(data_dir), "--port", "0", *flags]
    with pytest.raises(SystemExit) as stop:
        main(argv)
    # Python writes such a code to stderr and exits with 1.
    assert isinstance(stop.value.code, str)
    assert stop.value.code.startswith("prefixserve: ")
    assert "\n" not in stop.value.code
    return stop.value.code
