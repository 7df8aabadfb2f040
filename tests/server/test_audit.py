"""The audit log has a line for each administrative change, carried out or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix
from server.audit import AuditEntry, AuditLog
from server.errors import StartupError
from tests.server.live import live_server


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_change_and_every_refused_one_is_written(
    endless: LoadedModel, prefixes: dict[str, Prefix], tmp_path: Path
) -> None:
    path = tmp_path / "audit.jsonl"
    with live_server(endless, tmp_path) as server:
        first = server.upload("task", prefixes["short"])["version"]
        second = server.upload("task", prefixes["long"])["version"]
        tasks = "/admin/tasks"
        asked: list[tuple[str, str, Any, int, str | None]] = [
            ("POST", f"{tasks}/task/activate", {"version": first}, 200, first),
            ("POST", f"{tasks}/task/rollback", None, 200, second),
            ("POST", f"{tasks}/task/split", {first: 50, second: 50}, 200, second),
            ("POST", f"{tasks}/task/split", {first: 50}, 422, None),
            ("POST", f"{tasks}/task/pin", None, 200, second),
            ("DELETE", f"{tasks}/task/pin", None, 200, second),
            ("POST", f"{tasks}/task/split", {}, 200, second),
            ("DELETE", f"{tasks}/task/versions/{first}", None, 204, first),
            ("PUT", f"{tasks}/task", {"no": "text"}, 422, None),
            ("PUT", f"{tasks}/new", {"text": "A text."}, 201, ...),
            ("DELETE", f"{tasks}/nothing", None, 404, None),
            ("PUT", "/admin/tenants/default/limits", {"tasks": 9}, 200, None),
            ("PUT", "/admin/tenants/default/limits", {"tasks": -9}, 422, None),
            ("PUT", "/admin/tenants/default/keys/k1/limits", {}, 200, None),
            ("POST", f"{tasks}/nowhere", None, 405, None),
            ("DELETE", f"{tasks}/task", None, 204, None),
        ]
        for method, url, body, status, _ in asked:
            before = len(entries(path))
            sent = {} if body is None else {"json": body}
            answer = server.client.request(method, url, **sent)
            assert answer.status_code == status, (method, url, answer.text)
            assert len(entries(path)) == before + 1  # there before its client knows
            assert entries(path)[-1]["request_id"] == answer.headers["x-request-id"]
        for url in (tasks, f"{tasks}/task", "/admin/usage", "/health/live"):
            server.client.get(url)
        server.generate("Hi", max_new_tokens=1)
    found = entries(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(found) == 2 + len(asked)
    assert [(one["version"], one["outcome"]) for one in found[:2]] == [
        (first, "done"),
        (second, "done"),
    ]
    for entry, (method, url, _, status, version) in zip(found[2:], asked, strict=True):
        assert entry["action"].split()[0] == method
        assert entry["status"] == status
        assert entry["outcome"] == ("done" if status < 400 else "refused")
        assert entry["tenant"] == "default"
        assert version is ... or entry["version"] == version, url
        assert entry["task"] == (url.split("/")[3] if url.startswith(tasks) else None), url
    assert found[2]["action"] == "POST /admin/tasks/{task_id}/activate"
    assert found[-5]["target"] == {"tenant": "default"}
    assert found[-3]["target"] == {"tenant": "default", "key_id": "k1"}


async def test_two_servers_append_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_text('{"kept": true}\n')
    entry = AuditEntry("t", "r", "acme", None, "PUT /x", "task", {}, None, 200, "done")
    async with AuditLog(path) as one, AuditLog(path) as other:
        for log in (one, other, one):
            await log.write(entry)
    assert [found.get("tenant") for found in entries(path)] == [None, "acme", "acme", "acme"]


async def test_an_audit_log_that_cannot_be_written_is_told_at_start(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="--audit-log"):
        async with AuditLog(tmp_path):  # a folder
            pass


async def test_a_full_disk_is_told_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    entry = AuditEntry("t", "r", "acme", None, "PUT /x", "task", {}, None, 200, "done")
    async with AuditLog(Path("/dev/full")) as log:
        await log.write(entry)
    assert '"tenant": "acme"' in caplog.text
