"""`prefixserve batch run` on a real server."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from clients import Client
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
