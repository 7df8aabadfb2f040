"""`prefixserve batch run` on a real server."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from clients import Client
from tests.clients import faulty_server as faulty
from tests.clients.command_line import Run, printed, refused
from tests.server_process import ServerProcess

MORE_THAN_A_CALL_TAKES = 500


@pytest.fixture
def requests(real_server: ServerProcess, tmp_path: Path) -> Path:
    """Two requests to the base model, and one to a task that is not there."""
    with Client(real_server.url) as client:
        models = (client.info().model_id, "nobody", client.info().model_id)
    path = tmp_path / "in.jsonl"
    with path.open("w") as file:
        for at, model in enumerate(models):
            body = {"model": model, "prompt": "Hi", "max_tokens": 2}
            file.write(json.dumps(line(at, body)) + "\n")
    return path


def line(at: int, body: dict[str, Any]) -> dict[str, Any]:
    return {"custom_id": f"{at}", "method": "POST", "url": "/v1/completions", "body": body}


def names(path: Path) -> set[str]:
    return {json.loads(line)["custom_id"] for line in path.read_text().splitlines()}


def test_batch_run_writes_answers_and_errors(run: Run, requests: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    result = run("batch", "run", requests, output, "--interval", "0.05")
    assert result.exit_code == 1
    assert result.stdout == "completed: 2 answered, 1 failed of 3\n"
    assert names(output) == {"0", "2"}
    assert names(tmp_path / "out.jsonl.errors") == {"1"}
    assert {path.name for path in tmp_path.iterdir()} == {
        "in.jsonl",
        "out.jsonl",
        "out.jsonl.errors",
    }


def test_batch_run_goes_on_with_the_batch_it_began(
    run: Run, requests: Path, tmp_path: Path, real_server: ServerProcess
) -> None:
    requests.write_text(requests.read_text().splitlines()[0] + "\n")
    with Client(real_server.url) as client, requests.open("rb") as data:
        batch = client.create_batch(client.upload_file("in.jsonl", data).id)
    output = tmp_path / "out.jsonl"
    (tmp_path / "out.jsonl.batch").write_text(batch.id)
    found = printed(run("batch", "run", requests, output, "--interval", "0.05", "--json"))
    assert (found["id"], found["status"]) == (batch.id, "completed")
    assert names(output) == {"0"}


@pytest.mark.usefixtures("heard_ctrl_c")
def test_batch_run_is_interrupted_and_waits_again(run: Run, tmp_path: Path) -> None:
    output, state = tmp_path / "out", tmp_path / "out.batch"
    state.write_text("batch_7\n")
    batch = {
        "id": "batch_7",
        "endpoint": "/v1/completions",
        "input_file_id": "file_7",
        "status": "in_progress",
        "output_file_id": None,
        "error_file_id": None,
        "request_counts": {"total": 1, "completed": 0, "failed": 0},
        "errors": None,
    }
    with faulty.faulty_server() as server:
        waits = threading.Event()

        def never(handler: BaseHTTPRequestHandler) -> None:
            waits.set()
            server.stall(handler)

        server.script(faulty.answer(200, batch), never)
        asked = ["batch", "run", str(tmp_path / "in"), str(output), "--interval", "0.01", "--url"]
        command = [sys.executable, "-m", "clients", *asked, server.url]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            assert waits.wait(60)
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
            assert "batch_7 goes on: run the same command again" in process.stderr.read()
        assert state.read_text() == "batch_7\n"
        counts = {"total": 1, "completed": 1, "failed": 0}
        ended = batch | {"status": "completed", "request_counts": counts}
        server.script(faulty.answer(200, ended))
        assert run(*asked, server.url).stdout == "completed: 1 answered, 0 failed of 1\n"
    assert not state.exists()


def test_batch_run_refuses_what_is_no_batch(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("[]\n")
    refused(run("batch", "run", path, tmp_path / "out"), "expected .*custom_id")
    path.write_text('{"url": "/v1/embeddings"}\n')
    refused(run("batch", "run", path, tmp_path / "out"), "endpoint")
    refused(run("batch", "run", tmp_path / "none", tmp_path / "out"), "No such file")
    assert not (tmp_path / "out.batch").exists()


def test_a_client_cancels_a_batch(real_client: Client) -> None:
    body = {"model": real_client.info().model_id, "prompt": "Hi", "max_tokens": 20}
    content = b"".join(
        json.dumps(line(at, body)).encode() + b"\n" for at in range(MORE_THAN_A_CALL_TAKES)
    )
    file = real_client.upload_file("in.jsonl", io.BytesIO(content))
    assert real_client.file_content(file.id) == content
    batch = real_client.create_batch(file.id)
    assert real_client.batch(batch.id).endpoint == "/v1/completions"
    assert real_client.cancel_batch(batch.id).status in ("cancelling", "cancelled")
    while real_client.batch(batch.id).status != "cancelled":
        pass  # what runs of it ends first, and other tests use the same server
