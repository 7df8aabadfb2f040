"""Batches, with OpenAI's own client on a real server."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import Batch

from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix
from tests.server.conftest import MAX_LENGTH
from tests.server.live import DEADLINE_SECONDS, LiveServer, live_server
from tests.server.test_tenants import make_key

COMPLETIONS = "/v1/completions"
CHATS = "/v1/chat/completions"
LONG = 1500
"""Tokens that take seconds."""


def line(custom_id: str, max_tokens: int = 2, **changes: Any) -> dict[str, Any]:
    body = {"model": "short", "prompt": "Hi", "max_tokens": max_tokens, "temperature": 0}
    request = {"custom_id": custom_id, "method": "POST", "url": COMPLETIONS, "body": body}
    return {**request, **changes}


def json_lines(*lines: dict[str, Any] | str) -> bytes:
    texts = (one if isinstance(one, str) else json.dumps(one) for one in lines)
    return "".join(f"{text}\n" for text in texts).encode()


@contextmanager
def client_of(server: LiveServer, key: str = "none") -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with client_of(server) as client:
        yield client


def start(client: openai.OpenAI, data: bytes, endpoint: Any = COMPLETIONS) -> Batch:
    file = client.files.create(file=("requests.jsonl", data), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", metadata={"run": "7"}
    )


def when(client: openai.OpenAI, batch: Batch, condition: Callable[[Batch], bool]) -> Batch:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition(found := client.batches.retrieve(batch.id)):
        assert time.monotonic() < deadline, found
        assert found.status not in ("completed", "failed", "expired", "cancelled"), found
        time.sleep(0.01)
    return found


def ended(client: openai.OpenAI, batch: Batch, status: str) -> Batch:
    return when(client, batch, lambda found: found.status == status)


def results(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    return [json.loads(text) for text in client.files.content(file_id).text.splitlines()]


def counted(batch: Batch) -> tuple[int, int, int]:
    counts = batch.request_counts
    assert counts is not None
    return counts.total, counts.completed, counts.failed


def test_a_batch_answers_what_requests_are_answered(
    server: LiveServer, client: openai.OpenAI
) -> None:
    body = {"model": "middle", "max_tokens": 8, "temperature": 0, "n": 2}
    prompts = ["Once upon a time", "The sea", "Ångström"]
    lines = [line(f"№ {p}", body={**body, "prompt": p}) for p in prompts]
    batch = ended(client, start(client, json_lines(*lines)), "completed")
    assert counted(batch) == (3, 3, 0)
    assert batch.metadata == {"run": "7"}
    assert batch.error_file_id is None
    assert batch.created_at <= (batch.in_progress_at or 0) <= (batch.completed_at or 0)
    found = {one["custom_id"]: one["response"] for one in results(client, batch.output_file_id)}
    for prompt in prompts:
        expected = client.completions.create(**body, prompt=prompt).model_dump()
        answer = found[f"№ {prompt}"]
        assert answer["status_code"] == 200
        assert answer["body"]["choices"] == expected["choices"]
        assert answer["body"]["usage"]["total_tokens"] == expected["usage"]["total_tokens"]


def test_a_batch_of_chats(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    body = {"model": "middle", "messages": messages, "max_completion_tokens": 8, "temperature": 0}
    data = json_lines(line("a", url=CHATS, body=body))
    batch = ended(client, start(client, data, CHATS), "completed")
    [found] = results(client, batch.output_file_id)
    expected = client.chat.completions.create(**body).choices[0].message.content
    assert found["response"]["body"]["choices"][0]["message"]["content"] == expected


def test_lines_that_cannot_be_answered_are_errors_and_others_go_on(client: openai.OpenAI) -> None:
    bad: dict[str, tuple[int | None, dict[str, Any] | str]] = {
        "no JSON": (None, "{"),
        "deep": (None, '{"body": ' + "[" * 20_000),
        "a list": (None, "[]"),
        "surrogate": (None, '{"custom_id": "\\ud800"}'),
        "no method": (None, line("no method", method="GET")),
        "other url": (400, line("other url", url=CHATS)),
        "no prompt": (400, line("no prompt", body={"model": "short"})),
        "stream": (400, line("stream", body={**line("")["body"], "stream": True})),
        "no model": (404, line("no model", body={"model": "nobody", "prompt": "Hi"})),
        "too long": (400, line("too long", max_tokens=MAX_LENGTH)),
    }
    requests = [line("first"), *(one for _, one in bad.values()), "", line("last")]
    batch = ended(client, start(client, json_lines(*requests)), "completed")
    assert counted(batch) == (12, 2, 10)
    assert {one["custom_id"] for one in results(client, batch.output_file_id)} == {"first", "last"}
    errors = results(client, batch.error_file_id)
    assert len({one["id"] for one in errors}) == len(errors) == len(bad)
    by_name = {one["custom_id"]: one for one in errors}
    for name, (status, _) in bad.items():
        if status is not None:
            assert by_name[name]["response"]["status_code"] == status
            assert by_name[name]["response"]["body"]["error"]["message"]
    assert by_name["no method"]["error"]["code"] == "invalid_line"
    assert sum(one["response"] is None for one in errors) == 5


@pytest.mark.parametrize("data", [b"\n \n", json_lines(*[line("x")] * 21)])
def test_a_file_without_lines_or_with_too_many_fails(
    endless: LoadedModel, tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    flags = ("--max-batch-lines", "20", "--max-batch-file-bytes", "8KiB")
    flags += ("--max-batch-tenant-bytes", "20KiB")
    with (
        live_server(endless, tmp_path_factory.mktemp("few"), *flags) as server,
        client_of(server) as client,
    ):
        batch = ended(client, start(client, data), "failed")
        assert batch.errors is not None
        assert "expected 1 to 20" in ((batch.errors.data or [])[0].message or "")
        with pytest.raises(openai.APIStatusError, match="8192") as too_large:
            client.files.create(file=("x", b"x" * 8193), purpose="batch")
        assert too_large.value.status_code == 413
        client.files.create(file=("x", b"x" * 8192), purpose="batch")
        with pytest.raises(openai.APIStatusError, match="tenant-bytes"):
            client.files.create(file=("x", b"x" * 8192), purpose="batch")


def test_a_restart_goes_on_with_the_lines_that_are_not_done(
    endless: LoadedModel, prefixes: dict[str, Prefix], tmp_path: Path
) -> None:
    flags = ("--max-length", str(MAX_LENGTH), "--batch-concurrency", "1")
    requests = [line(f"{at}", max_tokens=LONG if at == 4 else 2) for at in range(8)]
    with live_server(endless, tmp_path, *flags) as server, client_of(server) as client:
        server.upload("short", prefixes["short"])
        batch = start(client, json_lines(*requests))
        next_one = start(client, json_lines(line("next")))
        late, without_file = (start(client, json_lines(line("x"))) for _ in range(2))
        client.files.delete(without_file.input_file_id)
        when(client, batch, lambda found: counted(found)[1] == 4)
    [output] = [
        p for p in (tmp_path / "batches").glob("file-*.jsonl") if b"choices" in p.read_bytes()
    ]
    kept = output.read_bytes()
    assert kept.count(b"\n") == 4
    output.write_bytes(kept + b'{"id": "torn')
    record = tmp_path / "batches" / f"{late.id}.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "expires_at": 1}))
    with live_server(endless, tmp_path, *flags) as server, client_of(server) as client:
        batch = ended(client, batch, "completed")
        assert counted(batch) == (8, 8, 0)
        assert batch.output_file_id is not None
        content = client.files.content(batch.output_file_id).content
        assert content.startswith(kept)
        found = results(client, batch.output_file_id)
        assert [one["custom_id"] for one in found] == [f"{at}" for at in range(8)]
        ended(client, next_one, "completed")
        assert counted(ended(client, late, "expired")) == (1, 0, 0)
        assert ended(client, without_file, "failed").errors is not None
        assert server.metric("requests_total", task="short", status="200") == 4 + 1


def test_people_go_before_batches(
    endless: LoadedModel, prefixes: dict[str, Prefix], tmp_path: Path
) -> None:
    flags = ("--max-length", str(MAX_LENGTH), "--max-slots", "1")
    with live_server(endless, tmp_path, *flags) as server, client_of(server) as client:
        server.upload("short", prefixes["short"])
        batch = start(client, json_lines(*[line("x", max_tokens=LONG * 4)] * 3))
        server.wait_until("running_requests", 1)
        assert server.generate("Hi", "short", max_new_tokens=2)
        # Within a priority nobody takes a slot from their own tenant.
        assert server.metric("preempted_total") == 1
        assert counted(client.batches.retrieve(batch.id))[1] == 0
        assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
        assert counted(ended(client, batch, "cancelled")) == (3, 0, 0)
        server.wait_until("running_requests", 0)
        with pytest.raises(openai.BadRequestError, match="cancelled"):
            client.batches.cancel(batch.id)


def test_a_line_waits_for_its_callers_limits(
    endless: LoadedModel, prefixes: dict[str, Prefix], tmp_path: Path
) -> None:
    flags = ("--limit-concurrent-requests", "1", "--max-length", str(MAX_LENGTH))
    with live_server(endless, tmp_path, *flags) as server, client_of(server) as client:
        server.upload("short", prefixes["short"])
        batch = start(client, json_lines(*[line(f"{at}", max_tokens=100) for at in range(3)]))
        assert counted(ended(client, batch, "completed")) == (3, 3, 0)
        assert server.metric("requests_total", task="short", status="429") > 0


def test_tenants_see_their_own_files_and_batches_only(endless: LoadedModel, tmp_path: Path) -> None:
    flags = ("--max-length", str(MAX_LENGTH), "--batch-concurrency", "1")
    with live_server(endless, tmp_path, *flags, auth=True) as server:
        mine, theirs = (make_key(server, name, "generate") for name in ("mine", "theirs"))
        with client_of(server, mine["key"]) as own, client_of(server, theirs["key"]) as other:
            base = {**line("")["body"], "model": endless.spec.name}
            lines = [line("a", body={**base, "max_tokens": LONG}), line("b", body=base)]
            batch = start(own, json_lines(*lines))
            absent = f"batch-{'0' * 32}"
            for call in (other.batches.retrieve, other.batches.cancel):
                with pytest.raises(openai.NotFoundError) as found:
                    call(batch.id)
                with pytest.raises(openai.NotFoundError) as expected:
                    call(absent)
                assert found.value.message.replace(batch.id, absent) == expected.value.message
            file_id = batch.input_file_id
            for take in (other.files.retrieve, other.files.content, other.files.delete):
                with pytest.raises(openai.NotFoundError):
                    take(file_id)
            with pytest.raises(openai.NotFoundError):
                other.batches.create(
                    input_file_id=file_id, endpoint=COMPLETIONS, completion_window="24h"
                )
            assert (list(other.batches.list()), list(other.files.list())) == ([], [])
            assert [one.id for one in own.batches.list()] == [batch.id]
            assert [one.id for one in own.files.list()] == [file_id]
            when(own, batch, lambda found: found.status == "in_progress")
            revoked = server.client.delete(f"/admin/keys/{mine['key_id']}")
            assert revoked.status_code == httpx.codes.OK
        again = make_key(server, "mine", "generate")
        with client_of(server, again["key"]) as own:
            batch = ended(own, batch, "failed")
            assert counted(batch) == (2, 1, 0)
            assert [one["custom_id"] for one in results(own, batch.output_file_id)] == ["a"]
            assert own.files.delete(file_id).deleted
            with pytest.raises(openai.NotFoundError):
                own.files.content(file_id)


def test_a_list_of_batches_has_pages(client: openai.OpenAI) -> None:
    made = {start(client, json_lines(line("x"))).id for _ in range(3)}
    listed = [batch.id for batch in client.batches.list(limit=1)]
    assert made <= set(listed)
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("path", ["..%2F..%2Fadmin.key", "file-1", "%00", "x" * 5000])
def test_names_that_are_none_are_not_found(server: LiveServer, path: str) -> None:
    for url in (f"/v1/files/{path}", f"/v1/files/{path}/content", f"/v1/batches/{path}"):
        assert server.client.get(url).status_code == httpx.codes.NOT_FOUND


def test_uploads_that_are_none_are_refused(server: LiveServer) -> None:
    for body in (
        {"json": {}},
        {"files": {"file": b"x"}},
        {"files": {"file": b"x"}, "data": {"purpose": "assistants"}},
        {"files": {"file": b"x", "other": b"y"}, "data": {"purpose": "batch"}},
        {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}},
    ):
        answer = server.client.post("/v1/files", **body)  # type: ignore[arg-type]
        assert answer.status_code in (400, 415), answer.text
        assert answer.json()["error"]["message"]
