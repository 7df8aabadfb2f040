"""Limits, quotas and usage of tenants that do not see each other's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix
from server.accounting import book
from tests.server.live import LiveServer, bearer, live_server


@dataclass(frozen=True)
class Key:
    """A key of a tenant, and a client that has it."""

    key_id: str
    client: httpx.Client

    def ask(self, **parameters: Any) -> httpx.Response:
        body = {"inputs": "Hi", "parameters": {"max_new_tokens": 2, **parameters}}
        return self.client.post("/generate", json=body)

    def upload(self, name: str, prefix: Prefix) -> httpx.Response:
        files = {"file": ("prefix.safetensors", prefix.to_bytes())}
        return self.client.put(f"/admin/tasks/{name}", files=files)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tenants")


@pytest.fixture(scope="module")
def server(endless: LoadedModel, data_dir: Path) -> Iterator[LiveServer]:
    with live_server(endless, data_dir, auth=True) as server:
        yield server


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes of limits are seen at once."""
    monkeypatch.setattr(book, "FRESH_SECONDS", 0.0)


@pytest.fixture
def tenant(request: pytest.FixtureRequest) -> str:
    """A tenant of the test's own."""
    name: str = request.node.name
    return name.partition("[")[0].replace("_", "-")[:50]


@pytest.fixture
def keys(server: LiveServer, tenant: str) -> Iterator[tuple[Key, Key]]:
    """Two keys of the tenant."""
    with new_key(server, tenant) as first, new_key(server, tenant) as second:
        yield (
            Key(first.headers["x-key-id"], first),
            Key(second.headers["x-key-id"], second),
        )


def new_key(server: LiveServer, tenant: str) -> httpx.Client:
    """A client with a new key of a tenant."""
    body = {"tenant": tenant, "scopes": ["generate", "admin"]}
    made = server.client.post("/admin/keys", json=body).json()
    headers = {**bearer(made["key"]), "x-key-id": made["key_id"]}
    return httpx.Client(base_url=server.url, headers=headers, timeout=60)


def set_limits(server: LiveServer, path: str, **limits: int) -> None:
    answer = server.client.put(f"/admin/tenants/{path}/limits", json=limits)
    assert answer.status_code == httpx.codes.OK, answer.text


def test_a_key_is_held_to_its_own_limits_and_its_tenants(
    server: LiveServer, tenant: str, keys: tuple[Key, Key]
) -> None:
    first, second = keys
    set_limits(server, tenant, requests_per_minute=3)
    set_limits(server, f"{tenant}/keys/{first.key_id}", requests_per_minute=1)
    answer = first.ask()
    assert answer.headers["x-ratelimit-limit-requests"] == "1"  # it has less left than the tenant
    refused = first.ask()
    assert refused.status_code == httpx.codes.TOO_MANY_REQUESTS
    assert "this API key has made 1 requests" in refused.json()["error"]
    assert second.ask().headers["x-ratelimit-remaining-requests"] == "1"
    assert second.ask().status_code == httpx.codes.OK
    refused = second.ask()
    assert refused.status_code == httpx.codes.TOO_MANY_REQUESTS
    assert f"tenant '{tenant}' has made 3 requests" in refused.json()["error"]
    assert (
        "x-ratelimit-limit-requests"
        not in server.client.post(
            "/generate", json={"inputs": "Hi", "parameters": {"max_new_tokens": 1}}
        ).headers
    )  # another tenant


def test_openais_api_refuses_in_its_own_words(
    server: LiveServer, tenant: str, keys: tuple[Key, Key]
) -> None:
    set_limits(server, tenant, requests_per_minute=1, tokens_per_minute=100)
    body = {"model": server.client.get("/v1/models").json()["data"][0]["id"], "prompt": "Hi"}
    answer = keys[0].client.post("/v1/completions", json={**body, "max_tokens": 2, "n": 2})
    usage = answer.json()["usage"]
    assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    [row] = keys[0].client.get("/admin/usage").json()
    assert (row["prompt_tokens"], row["generated_tokens"]) == (
        usage["prompt_tokens"],
        usage["completion_tokens"],
    )
    refused = keys[0].client.post("/v1/completions", json=body)
    assert refused.status_code == httpx.codes.TOO_MANY_REQUESTS
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"


def test_only_the_operator_sets_limits_and_sees_anothers(
    server: LiveServer, tenant: str, keys: tuple[Key, Key], data_dir: Path
) -> None:
    key = keys[0]
    own, others = f"/admin/tenants/{tenant}/limits", "/admin/tenants/other/limits"
    set_limits(server, tenant, tasks=7)
    assert key.client.get(own).json()["limits"] == {"tasks": 7}
    assert [one["tenant"] for one in key.client.get("/admin/limits").json()] == [tenant]
    for method, path in (
        ("PUT", own),
        ("PUT", f"/admin/tenants/{tenant}/keys/{key.key_id}/limits"),
        ("GET", others),
        ("PUT", others),
    ):
        sent = {"json": {}} if method == "PUT" else {}
        answer = key.client.request(method, path, **sent)
        assert (answer.status_code, answer.json()["error_type"]) == (403, "forbidden")
    assert server.client.get(own).json()["limits"] == {"tasks": 7}
    lines = (data_dir / "audit.jsonl").read_text().splitlines()
    refused = json.loads(lines[-1])
    assert (refused["tenant"], refused["key_id"]) == (tenant, key.key_id)
    assert (refused["action"], refused["status"], refused["outcome"]) == (
        *("PUT /admin/tenants/{tenant}/limits", 403, "refused"),
    )


def test_the_audit_log_says_which_key_was_made(
    tenant: str, keys: tuple[Key, Key], data_dir: Path
) -> None:
    made = json.loads((data_dir / "audit.jsonl").read_text().splitlines()[-1])
    assert made["action"] == "POST /admin/keys"
    assert made["target"] == {"tenant": tenant, "key_id": keys[1].key_id}
    assert (made["tenant"], made["key_id"]) == ("default", "admin")


def test_usage_is_a_tenants_own(server: LiveServer, tenant: str, keys: tuple[Key, Key]) -> None:
    key = keys[0]
    key.ask(max_new_tokens=5)
    [row] = key.client.get("/admin/usage").json()
    assert (row["tenant"], row["sequences"], row["generated_tokens"]) == (tenant, 1, 5)
    assert key.client.get("/admin/usage", params={"tenant": tenant}).json() == [row]
    answer = key.client.get("/admin/usage", params={"tenant": "default"})
    assert answer.status_code == httpx.codes.FORBIDDEN
    assert row in server.client.get("/admin/usage").json()
    assert server.metric("tenant_tokens_total", tenant=tenant, kind="generated") == 5


def test_what_a_tenant_stores_is_bounded(
    server: LiveServer, tenant: str, keys: tuple[Key, Key], prefixes: dict[str, Prefix]
) -> None:
    key = keys[0]
    set_limits(server, tenant, tasks=1, prefix_tokens=8)
    assert key.upload("first", prefixes["middle"]).status_code == httpx.codes.CREATED
    answer = key.upload("second", prefixes["short"])
    assert (answer.status_code, answer.json()["error_type"]) == (403, "quota_exceeded")
    answer = key.upload("first", prefixes["long"])
    assert (answer.status_code, answer.json()["error_type"]) == (413, "too_large")
    assert "at most 8" in answer.json()["error"]
    answer = key.client.put("/admin/tasks/first", json={"text": "a long text " * 9})
    assert (answer.status_code, answer.json()["error_type"]) == (413, "too_large")
    set_limits(server, tenant, stored_bytes=len(prefixes["middle"].to_bytes()) + 10)
    answer = key.upload("first", prefixes["short"])  # the version before stays
    assert (answer.status_code, answer.json()["error_type"]) == (403, "quota_exceeded")
    assert [task["task_id"] for task in key.client.get("/admin/tasks").json()] == ["first"]
    assert len(key.client.get("/admin/tasks/first/versions").json()) == 1
    assert key.client.delete("/admin/tasks/first").status_code == httpx.codes.NO_CONTENT
    assert key.upload("second", prefixes["short"]).status_code == httpx.codes.CREATED
