"""Versions of a task over HTTP: conditional changes, roll-back, splits, downloads in parts."""

from __future__ import annotations

import hashlib
import uuid
from collections import Counter
from typing import Any

import httpx
import pytest

from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix
from tests.engine.reference import random_prefix
from tests.server.live import LiveServer

ABSENT = f"sha256:{'0' * 64}"


@pytest.fixture
def task_id() -> str:
    return f"task-{uuid.uuid4().hex[:8]}"


@pytest.fixture(scope="module")
def generations(endless: LoadedModel) -> list[Prefix]:
    """Prefixes to upload one after the other."""
    return [random_prefix(endless, 4, seed=seed) for seed in range(200, 206)]


def put(server: LiveServer, task_id: str, prefix: Prefix, **options: Any) -> httpx.Response:
    files = {"file": ("prefix.safetensors", prefix.to_bytes())}
    return server.client.put(f"/admin/tasks/{task_id}", files=files, **options)


def post(server: LiveServer, task_id: str, action: str, body: Any = None, **options: Any) -> Any:
    return server.client.post(f"/admin/tasks/{task_id}/{action}", json=body, **options)


def versions_of(server: LiveServer, task_id: str) -> list[dict[str, Any]]:
    answer = server.client.get(f"/admin/tasks/{task_id}/versions")
    assert answer.status_code == httpx.codes.OK, answer.text
    found: list[dict[str, Any]] = answer.json()
    return found


def served(server: LiveServer, task_id: str, **fields: Any) -> str:
    body = {"inputs": "Hi", "task_id": task_id, "parameters": {"max_new_tokens": 1}, **fields}
    answer = server.client.post("/generate", json=body)
    assert answer.status_code == httpx.codes.OK, answer.text
    version: str = answer.json()["version"]
    return version


def test_keeps_the_last_versions_newest_first(
    server: LiveServer, generations: list[Prefix], task_id: str
) -> None:
    versions = [server.upload(task_id, prefix)["version"] for prefix in generations]

    listed = versions_of(server, task_id)

    assert [found["version"] for found in listed] == versions[:0:-1]
    assert [found["active"] for found in listed] == [True] + [False] * 4
    assert [found["percent"] for found in listed] == [100] + [0] * 4


def test_activate_and_roll_back(
    server: LiveServer, generations: list[Prefix], task_id: str
) -> None:
    first, second, third = (server.upload(task_id, p)["version"] for p in generations[:3])

    answer = post(server, task_id, "activate", {"version": first})
    assert (answer.json()["version"], answer.headers["etag"]) == (first, f'"{first}"')
    assert served(server, task_id) == first

    for expected in (third, second):
        assert post(server, task_id, "rollback").json()["version"] == expected
        assert served(server, task_id) == expected
    refused = post(server, task_id, "rollback")
    assert (refused.status_code, refused.json()["error_type"]) == (409, "conflict")
    assert served(server, task_id) == second


def test_an_upload_can_wait_to_be_activated(
    server: LiveServer, generations: list[Prefix], task_id: str
) -> None:
    quietly = {"params": {"activate": "false"}}
    assert put(server, task_id, generations[0], **quietly).status_code == 404
    old = server.upload(task_id, generations[0])["version"]

    new = put(server, task_id, generations[1], **quietly).json()["version"]

    assert served(server, task_id) == old
    assert [found["version"] for found in versions_of(server, task_id)] == [new, old]
    post(server, task_id, "activate", {"version": new})
    assert served(server, task_id) == new


def test_a_split_shares_requests_and_sticks_to_users(
    server: LiveServer, generations: list[Prefix], task_id: str
) -> None:
    old, new = (server.upload(task_id, prefix)["version"] for prefix in generations[:2])
    answer = post(server, task_id, "split", {old: 70, new: 30})
    assert answer.json()["split"] == {old: 70, new: 30}
    assert {v["version"]: v["percent"] for v in versions_of(server, task_id)} == {old: 70, new: 30}

    users = [f"user-{number}" for number in range(40)]
    first = {user: served(server, task_id, user=user) for user in users}
    again = {user: served(server, task_id, user=user) for user in users}
    assert first == again
    counts = Counter(first.values())
    assert counts[old] > counts[new] > 0
    assert {served(server, task_id) for _ in range(60)} == {old, new}

    # Who has the new version keeps it when its share grows.
    post(server, task_id, "split", {old: 40, new: 60})
    grown = {user: served(server, task_id, user=user) for user in users}
    assert all(grown[user] == new for user in users if first[user] == new)
    assert Counter(grown.values())[new] > counts[new]

    labels = {"task": task_id, "version": new}
    assert server.metric("split_requests_total", **labels) > 0
    assert server.metric("split_generated_tokens_total", **labels) > 0
    assert server.metric("split_request_seconds_count", **labels) > 0

    assert post(server, task_id, "split", {}).json()["split"] == {}
    assert {served(server, task_id) for _ in range(20)} == {new}


@pytest.mark.parametrize(
    ("body", "refusal"),
    [
        ({"A": 90, "B": 20}, (422, "add to 110 percent; expected 100")),
        ({"A": 99}, (422, "add to 99 percent")),
        ({"A": 150, "B": -50}, (422, "is 150; expected 1 to 100")),
        ({"A": 100, "B": 0}, (422, "is 0; expected 1 to 100")),
        ({"A": 50.5, "B": 49.5}, (422, "valid integer")),
        ({"A": "50", "B": "50"}, (422, "valid integer")),
        ({"A": True, "B": 99}, (422, "valid integer")),
        ({"A": 50, ABSENT: 50}, (404, "keeps no version")),
        ({"A": 50, "x\u0000": 50}, (404, "keeps no version")),
        (["A"], (422, "dictionary")),
        (None, (422, "")),
    ],
)
def test_a_bad_split_changes_nothing(
    server: LiveServer, generations: list[Prefix], task_id: str, body: Any, refusal: tuple[int, str]
) -> None:
    names = dict(
        zip("AB", (server.upload(task_id, p)["version"] for p in generations[:2]), strict=True)
    )
    if isinstance(body, dict):
        body = {names.get(name, name): percent for name, percent in body.items()}
    before = versions_of(server, task_id)

    answer = post(server, task_id, "split", body)

    status, says = refusal
    assert (answer.status_code, says in answer.json()["error"]) == (status, True), answer.text
    assert versions_of(server, task_id) == before


def test_a_version_in_use_cannot_be_deleted(
    server: LiveServer, generations: list[Prefix], task_id: str
) -> None:
    old, middle, new = (server.upload(task_id, p)["version"] for p in generations[:3])
    post(server, task_id, "split", {middle: 10, new: 90})

    def delete(version: str) -> int:
        return server.client.delete(f"/admin/tasks/{task_id}/versions/{version}").status_code

    assert [delete(version) for version in (new, middle, old, old)] == [409, 409, 204, 404]
    assert [found["version"] for found in versions_of(server, task_id)] == [new, middle]
    params = {"version": old}
    assert server.client.get(f"/admin/tasks/{task_id}/prefix", params=params).status_code == 404


@pytest.mark.parametrize("version", [ABSENT, "latest", "x" * 10_000, "\u2028", "a b"])
def test_a_version_that_is_not_there(
    server: LiveServer, generations: list[Prefix], task_id: str, version: str
) -> None:
    server.upload(task_id, generations[0])
    before = versions_of(server, task_id)

    answers = [
        post(server, task_id, "activate", {"version": version}),
        server.client.delete(f"/admin/tasks/{task_id}/versions/{version}"),
        server.client.get(f"/admin/tasks/{task_id}/prefix", params={"version": version}),
    ]

    for answer in answers:
        assert (answer.status_code, answer.json()["error_type"]) == (404, "not_found"), answer.text
        assert len(answer.text) < 500
    assert versions_of(server, task_id) == before


def test_actions_on_no_task(server: LiveServer, task_id: str) -> None:
    answers = [
        server.client.get(f"/admin/tasks/{task_id}/versions"),
        post(server, task_id, "activate", {"version": ABSENT}),
        post(server, task_id, "rollback"),
        post(server, task_id, "split", {}),
        server.client.delete(f"/admin/tasks/{task_id}/versions/{ABSENT}"),
    ]
    assert [answer.status_code for answer in answers] == [404] * 5
    assert post(server, "bad name", "rollback").status_code == 422


def test_conditional_changes(server: LiveServer, generations: list[Prefix], task_id: str) -> None:
    def status(prefix: int, header: str, value: str) -> int:
        return put(server, task_id, generations[prefix], headers={header: value}).status_code

    assert status(0, "If-Match", "*") == 412
    assert server.client.get(f"/admin/tasks/{task_id}").status_code == 404
    assert status(0, "If-None-Match", "*") == 201
    assert status(1, "If-None-Match", "*") == 412
    etag = server.client.get(f"/admin/tasks/{task_id}").headers["etag"]
    assert status(1, "If-Match", f'"{ABSENT}"') == 412
    assert status(1, "If-Match", f"W/{etag}") == 412
    assert status(1, "If-None-Match", etag) == 412
    assert status(1, "If-Match", etag.strip('"')) == 422
    assert [found["version"] for found in versions_of(server, task_id)] == [etag.strip('"')]

    assert status(1, "If-Match", f'"{ABSENT}", {etag}') == 201
    stale = {"headers": {"If-Match": etag}}
    answers = [
        post(server, task_id, "rollback", **stale),
        post(server, task_id, "split", {}, **stale),
        post(server, task_id, "activate", {"version": etag.strip('"')}, **stale),
        server.client.delete(f"/admin/tasks/{task_id}/versions/{etag.strip(chr(34))}", **stale),
        server.client.delete(f"/admin/tasks/{task_id}", **stale),
    ]
    for answer in answers:
        kind = answer.json()["error_type"]
        assert (answer.status_code, kind) == (412, "precondition_failed"), answer.text
    assert (
        server.client.delete(f"/admin/tasks/{task_id}", headers={"If-Match": "*"}).status_code
        == 204
    )


def test_a_download_in_parts(server: LiveServer, generations: list[Prefix], task_id: str) -> None:
    version = server.upload(task_id, generations[0])["version"]
    data = generations[0].to_bytes()
    assert version == f"sha256:{hashlib.sha256(data).hexdigest()}"
    size = len(data)

    def get(**headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return server.client.get(f"/admin/tasks/{task_id}/prefix", headers=named)

    whole = get()
    assert (whole.status_code, whole.content) == (200, data)
    assert whole.headers["etag"] == f'"{version}"'
    assert whole.headers["accept-ranges"] == "bytes"
    for value, start, stop in [
        ("bytes=0-0", 0, 1),
        ("bytes=10-99", 10, 100),
        ("bytes=100-", 100, size),
        (f"bytes=5-{10**15}", 5, size),
        ("bytes=-7", size - 7, size),
        (f"bytes=-{10**15}", 0, size),
    ]:
        part = get(Range=value)
        assert (part.status_code, part.content) == (206, data[start:stop]), value
        assert part.headers["content-range"] == f"bytes {start}-{stop - 1}/{size}"
    for value in (f"bytes={size}-", "bytes=-0"):
        none = get(Range=value)
        assert (none.status_code, none.headers["content-range"]) == (416, f"bytes */{size}")
    for value in ("bytes=9-3", "bytes=0-1,5-6", "lines=1-2", "bytes=-", "nonsense"):
        assert get(Range=value).content == data
    assert get(Range="bytes=0-9", If_Range=f'"{ABSENT}"').content == data
    assert get(Range="bytes=0-9", If_Range=f'"{version}"').content == data[:10]
    for value in (f'"{version}"', f'W/"{version}"', "*", f'"x", "{version}"'):
        same = get(If_None_Match=value)
        assert (same.status_code, same.content) == (304, b"")
    assert get(If_None_Match='"x"').content == data
