"""Request ids, and what the log says of requests and what it never does."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from httpx_sse import connect_sse

from prefix_store.model_loading import LoadedModel
from server.logs import REQUESTS
from tests.server.live import LiveServer, live_server
from tests.server_process import running_server

MADE = re.compile(r"[0-9a-f]{32}")


@pytest.mark.parametrize("given", ["abc-123", "1-67891233:x.y_z", "x" * 128])
def test_a_sane_request_id_is_returned(server: LiveServer, given: str) -> None:
    headers = {"X-Request-Id": given}
    body = {"inputs": "Hi", "parameters": {"max_new_tokens": 1}}
    assert server.client.get("/info", headers=headers).headers["x-request-id"] == given
    assert server.client.get("/nowhere", headers=headers).headers["x-request-id"] == given
    with connect_sse(
        server.client, "POST", "/generate_stream", json=body, headers=headers
    ) as source:
        assert source.response.headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", "a\tb", 'a"b', "a\u00e9".encode(), "{x}"])
def test_any_other_is_replaced(server: LiveServer, given: str | bytes) -> None:
    answer = server.client.get("/info", headers={"X-Request-Id": given})
    assert MADE.fullmatch(answer.headers["x-request-id"])


def test_two_of_them_are_replaced(server: LiveServer) -> None:
    answer = server.client.get("/info", headers=[("X-Request-Id", "a"), ("X-Request-Id", "b")])
    assert MADE.fullmatch(answer.headers["x-request-id"])


def facts(caplog: pytest.LogCaptureFixture, request_id: str) -> dict[str, Any]:
    """What the one line about a request says."""
    [record] = [
        record
        for record in caplog.records
        if record.name == REQUESTS and record.__dict__["request_id"] == request_id
    ]
    found: dict[str, Any] = record.__dict__["facts"]
    return found


def test_a_request_has_a_line_with_what_it_used(
    server: LiveServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    body = {"inputs": ["Hi", "Hi"], "task_id": "middle", "parameters": {"max_new_tokens": 3}}
    server.client.post("/generate", json=body, headers={"X-Request-Id": "told"})
    found = facts(caplog, "told")
    assert found.pop("seconds") > found.pop("queue_seconds") >= 0
    assert found == {
        "method": "POST",
        "path": "/generate",
        "status": 200,
        "tenant": "default",
        "key_id": None,
        "task": "middle",
        "sequences": 2,
        "prompt_tokens": 2,
        "prefix_tokens": 16,
        "generated_tokens": 6,
    }


def test_a_path_cannot_write_lines_of_its_own(
    server: LiveServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    server.client.get("/no%0Awhere?key=secret", headers={"X-Request-Id": "lines"})
    assert facts(caplog, "lines")["path"] == "/no%0Awhere"


def test_prompts_are_logged_where_that_is_asked_for(
    endless: LoadedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with live_server(endless, tmp_path, "--log-prompts") as server:
        body = {"inputs": "Hi there", "parameters": {"max_new_tokens": 1}}
        server.client.post("/generate", json=body, headers={"X-Request-Id": "asked"})
    assert facts(caplog, "asked")["inputs"] == ["Hi there"]


def test_the_log_is_json_and_holds_no_prompt_and_no_key(
    endless_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # a line for each module, in the same file
    secret = "Xyzzy7"  # noqa: S105
    flags = ["--no-demo-tasks", "--log-format", "json", "--log-level", "debug"]
    with (
        running_server(endless_dir, tmp_path, *flags) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        head = server.headers
        bodies: list[Any] = [
            {"inputs": secret, "parameters": {"max_new_tokens": 2}},
            {"inputs": secret, "user": secret, "parameters": {"max_new_tokens": 99_999}},
            {"inputs": [secret, 7]},
            {"inputs": "Hi", "api_key": secret},
        ]
        for body in bodies:
            for path in ("/generate", "/generate_stream"):
                client.post(path, json=body, headers=head, params={"key": secret})
        client.post("/generate", content=f"{{{secret}", headers=head)
        client.put("/admin/tasks/new", json={"text": secret}, headers=head)
        client.put("/admin/tasks/new", files={"file": secret.encode()}, headers=head)
        client.get("/info", headers={"Authorization": f"Bearer {secret}"})
        client.get("/info", headers={**head, "X-Request-Id": "mine"})
        server.stop()
    lines = server.log.read_text().splitlines()
    logged = [json.loads(line) for line in lines if line.startswith("{")]
    assert len(logged) > len(bodies) * 2
    # What it prints once it is ready is for people.
    others = [line for line in lines if not line.startswith("{")]
    assert all(not re.match(r"\d{4}-", line) for line in others)
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in logged)
    [mine] = [line for line in logged if line.get("request_id") == "mine"]
    assert (mine["path"], mine["status"]) == ("/info", 200)
    assert mine["logger"] == REQUESTS
    assert any("server.tracing" in line for line in others)
    assert not any("opentelemetry.exporter" in line for line in others)  # an option
    for path in (server.log, tmp_path / "audit.jsonl"):
        assert secret not in path.read_text()
        assert server.key.split("-", 2)[2] not in path.read_text()
