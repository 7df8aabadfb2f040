"""Tenants on one server: nobody sees, changes or notices what is not theirs."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from redis import Redis

from prefix_store.data_dir import admin_key_file
from prefix_store.embedded import EmbeddedValkey
from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix, version_of
from tests.server.live import DEADLINE_SECONDS, LiveServer, bearer, live_server
from tests.server.test_replicas import until

FEW = {"max_new_tokens": 1}
CHANGING = ("date", "x-request-id")
"""Headers that no two answers have in common."""


@dataclass(frozen=True)
class Tenant:
    """A tenant's view of the server, with a key of every scope that it may have."""

    name: str
    client: httpx.Client

    def generate(self, task_id: str) -> httpx.Response:
        body = {"inputs": "Hi", "task_id": task_id, "parameters": FEW}
        return self.client.post("/generate", json=body)

    def upload(self, name: str, prefix: Prefix) -> str:
        files = {"file": ("prefix.safetensors", prefix.to_bytes())}
        answer = self.client.put(f"/admin/tasks/{name}", files=files)
        assert answer.status_code == httpx.codes.CREATED, answer.text
        return str(answer.json()["version"])

    def share(self, name: str, *tenants: str) -> dict[str, Any]:
        answer = self.client.put(f"/admin/tasks/{name}/sharing", json={"tenants": list(tenants)})
        assert answer.status_code == httpx.codes.OK, answer.text
        return dict(answer.json())


def make_key(server: LiveServer, tenant: str, *scopes: str) -> dict[str, Any]:
    answer = server.client.post("/admin/keys", json={"tenant": tenant, "scopes": list(scopes)})
    assert answer.status_code == httpx.codes.CREATED, answer.text
    return dict(answer.json())


def tenant(server: LiveServer, name: str) -> Tenant:
    key = make_key(server, name, "admin", "generate")["key"]
    return Tenant(name, httpx.Client(base_url=server.url, headers=bearer(key), timeout=60))


@pytest_asyncio.fixture(scope="module")
async def valkey(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedValkey]:
    async with EmbeddedValkey(tmp_path_factory.mktemp("external")) as valkey:
        yield valkey


@pytest.fixture(scope="module")
def guarded(
    valkey: EmbeddedValkey, endless: LoadedModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    flags = ("--redis-url", valkey.url, "--max-slots", "4")
    with live_server(endless, tmp_path_factory.mktemp("data"), *flags, auth=True) as server:
        yield server


@pytest.fixture(scope="module")
def acme(guarded: LiveServer) -> Iterator[Tenant]:
    found = tenant(guarded, "acme")
    with found.client:
        yield found


@pytest.fixture(scope="module")
def beta(guarded: LiveServer) -> Iterator[Tenant]:
    found = tenant(guarded, "beta")
    with found.client:
        yield found


def everything_about(
    client: httpx.Client, name: str, version: str, prefix: Prefix
) -> Iterator[tuple[str, Any]]:
    """Every request that names a task, and its whole answer but for the time."""
    path = f"/admin/tasks/{name}"
    generate = {"inputs": "Hi", "parameters": FEW}
    if_match = {"If-Match": f'"{version}"'}
    requests: list[tuple[str, str, dict[str, Any]]] = [
        ("GET", path, {}),
        ("GET", f"{path}/versions", {}),
        ("GET", f"{path}/prefix", {}),
        ("GET", f"{path}/prefix?version={version}", {}),
        ("GET", f"{path}/prefix", {"headers": {"Range": "bytes=0-3"}}),
        ("GET", f"{path}/prefix", {"headers": {"If-None-Match": f'"{version}"'}}),
        ("PUT", f"{path}?activate=false", {"files": {"file": prefix.to_bytes()}}),
        ("PUT", path, {"files": {"file": prefix.to_bytes()}, "headers": if_match}),
        ("PUT", f"{path}/sharing", {"json": {"tenants": ["public"]}}),
        ("POST", f"{path}/activate", {"json": {"version": version}}),
        ("POST", f"{path}/activate", {"json": {"version": version}, "headers": if_match}),
        ("POST", f"{path}/rollback", {}),
        ("POST", f"{path}/split", {"json": {version: 100}}),
        ("POST", f"{path}/pin", {}),
        ("DELETE", f"{path}/pin", {}),
        ("DELETE", f"{path}/versions/{version}", {}),
        ("DELETE", path, {}),
        ("DELETE", path, {"headers": if_match}),
        ("POST", "/generate", {"json": {**generate, "task_id": name}}),
        ("POST", "/generate_stream", {"json": {**generate, "task_id": name}}),
        ("POST", "/", {"json": {"inputs": "Hi", "parameters": {**FEW, "adapter_id": name}}}),
        ("GET", "/admin/tasks", {}),
        ("GET", "/v1/models", {}),
        ("GET", f"/v1/models/{name}", {}),
        ("POST", "/v1/completions", {"json": {"model": name, "prompt": "Hi", "max_tokens": 1}}),
    ]
    for method, where, body in requests:
        answer = client.request(method, where, **body)
        headers = [(key, value) for key, value in answer.headers.items() if key not in CHANGING]
        yield f"{method} {where}", (answer.status_code, headers, answer.content)


def test_anothers_task_answers_as_one_that_does_not_exist(
    acme: Tenant, beta: Tenant, prefixes: dict[str, Prefix]
) -> None:
    """Byte for byte, whether it is cold or in use; and its owner's stays as it was."""
    prefix = prefixes["long"]
    version = version_of(prefix.to_bytes())
    names = ("secret", "acme/secret", "acme%2Fsecret")

    def probed() -> dict[str, Any]:
        return {
            f"{name}: {what}": answer
            for name in names
            for what, answer in everything_about(beta.client, name, version, prefixes["short"])
        }

    before = probed()
    assert {answer[0] for answer in before.values()} <= {200, 404, 412, 422}
    acme.upload("secret", prefix)
    assert probed() == before
    assert acme.generate("secret").json()["version"] == version
    acme.client.post("/admin/tasks/secret/pin")
    assert probed() == before
    mine = acme.client.get("/admin/tasks/secret").json()
    assert (mine["version"], mine["pinned"], mine["shared_with"]) == (version, True, [])
    acme.client.delete("/admin/tasks/secret")
    assert probed() == before


def settled(redis: Redis) -> None:
    """Return when what follows the store has seen the last change: it looked and found none."""

    def calls() -> tuple[int, int]:
        stats = redis.info("commandstats")
        looked_up, followed = (stats.get(f"cmdstat_{name}", {}) for name in ("hget", "xrange"))
        return looked_up.get("calls", 0), followed.get("calls", 0)

    deadline = time.monotonic() + DEADLINE_SECONDS
    before = calls()
    while (now := calls())[1] < before[1] + 3:
        assert time.monotonic() < deadline
        if now[0] != before[0]:
            before = now
        time.sleep(0.01)


def test_probing_asks_the_store_the_same(
    acme: Tenant, beta: Tenant, prefixes: dict[str, Prefix], valkey: EmbeddedValkey
) -> None:
    """What takes time does not depend on whether there is such a task, or whether it is in use."""
    acme.upload("hot", prefixes["short"])
    acme.upload("cold", prefixes["short"])
    acme.generate("hot")
    with Redis.from_url(valkey.url) as redis:

        def commands(name: str) -> dict[str, int]:
            """How often a task may have been looked for; limits and the log use other commands."""
            redis.config_resetstat()
            assert beta.generate(name).status_code == httpx.codes.NOT_FOUND
            stats = redis.info("commandstats")
            return {
                command: stats[f"cmdstat_{command}"]["calls"]
                for command in ("hget", "hgetall", "hscan", "exists", "getrange")
                if f"cmdstat_{command}" in stats
            }

        settled(redis)
        for _ in range(2):
            asked = [commands(name) for name in ("acme/hot", "acme/cold", "acme/never", "x/y")]
            assert asked == [{}] * 4


def test_names_are_per_tenant(
    guarded: LiveServer, acme: Tenant, beta: Tenant, prefixes: dict[str, Prefix]
) -> None:
    versions = {
        acme.name: acme.upload("same", prefixes["short"]),
        beta.name: beta.upload("same", prefixes["middle"]),
        "default": guarded.upload("same", prefixes["long"])["version"],
    }
    for one in (acme, beta):
        answer = one.generate("same").json()
        assert (answer["task_id"], answer["version"]) == ("same", versions[one.name])
        listed = {
            task["task_id"]: task["version"] for task in one.client.get("/admin/tasks").json()
        }
        assert listed["same"] == versions[one.name]
    assert guarded.generate("Hi", "same", **FEW)["version"] == versions["default"]
    assert acme.client.delete("/admin/tasks/same").status_code == httpx.codes.NO_CONTENT
    assert beta.generate("same").json()["version"] == versions["beta"]
    own = acme.client.get("/admin/tasks/other%2Fname")
    assert own.status_code == httpx.codes.NOT_FOUND


def test_a_version_of_anothers_task_is_none_of_ones_own(
    acme: Tenant, beta: Tenant, prefixes: dict[str, Prefix]
) -> None:
    theirs = acme.upload("versions", prefixes["short"])
    own = beta.upload("versions", prefixes["middle"])
    path = "/admin/tasks/versions"
    for method, where, body in (
        ("GET", f"{path}/prefix?version={theirs}", {}),
        ("POST", f"{path}/activate", {"json": {"version": theirs}}),
        ("POST", f"{path}/split", {"json": {own: 50, theirs: 50}}),
        ("DELETE", f"{path}/versions/{theirs}", {}),
    ):
        answer = beta.client.request(method, where, **body)
        never = beta.client.request(
            method,
            where.replace(theirs, f"sha256:{0:064}"),
            **{
                key: {"version": f"sha256:{0:064}"}
                if "version" in value
                else {own: 50, f"sha256:{0:064}": 50}
                for key, value in body.items()
            },
        )
        assert answer.status_code == never.status_code == httpx.codes.NOT_FOUND
        assert answer.text.replace(theirs, "") == never.text.replace(f"sha256:{0:064}", "")


def test_sharing(
    guarded: LiveServer, acme: Tenant, beta: Tenant, prefixes: dict[str, Prefix]
) -> None:
    version = acme.upload("lent", prefixes["middle"])
    assert acme.share("lent", "beta", "acme")["shared_with"] == ["beta"]
    answer = beta.generate("acme/lent").json()
    assert (answer["task_id"], answer["version"]) == ("acme/lent", version)
    models = [model["id"] for model in beta.client.get("/v1/models").json()["data"]]
    assert "acme/lent" in models
    assert beta.generate("lent").status_code == httpx.codes.NOT_FOUND
    body = {"inputs": "Hi", "task_id": "acme/lent"}
    assert guarded.client.post("/generate", json=body).status_code == httpx.codes.NOT_FOUND
    for path in ("", "/prefix", "/versions"):  # to use is not to have
        found = beta.client.get(f"/admin/tasks/acme%2Flent{path}")
        assert found.status_code == httpx.codes.NOT_FOUND
    assert "lent" not in beta.client.get("/admin/tasks").text

    assert acme.share("lent", "public", "beta")["shared_with"] == ["public"]
    assert guarded.generate("Hi", "acme/lent", **FEW)["version"] == version
    newer = acme.upload("lent", prefixes["long"])
    assert beta.generate("acme/lent").json()["version"] == newer, "sharing stays"
    assert acme.share("lent")["shared_with"] == []
    assert beta.generate("acme/lent").status_code == httpx.codes.NOT_FOUND

    acme.share("lent", "beta")
    acme.client.delete("/admin/tasks/lent")
    acme.upload("lent", prefixes["short"])
    assert beta.generate("acme/lent").status_code == httpx.codes.NOT_FOUND, "not by its name alone"

    guarded.upload("of-the-house", prefixes["short"])
    guarded.client.put("/admin/tasks/of-the-house/sharing", json={"tenants": ["public"]})
    assert acme.generate("default/of-the-house").status_code == httpx.codes.OK
    assert acme.generate("of-the-house").status_code == httpx.codes.NOT_FOUND


@pytest.mark.parametrize("tenants", [["Public"], ["a b"], [""], ["x" * 64], "public", [1], None])
def test_sharing_with_what_is_no_tenant(acme: Tenant, tenants: object) -> None:
    answer = acme.client.put("/admin/tasks/nothing/sharing", json={"tenants": tenants})
    assert answer.status_code in (httpx.codes.NOT_FOUND, httpx.codes.UNPROCESSABLE_ENTITY)


def test_keys_of_another_tenant_are_none_that_exist(
    guarded: LiveServer, acme: Tenant, beta: Tenant
) -> None:
    theirs = make_key(guarded, "acme", "generate")["key_id"]
    answers = [
        (found := beta.client.delete(f"/admin/keys/{key_id}")).text.replace(key_id, "")
        + str(found.status_code)
        for key_id in (theirs, "0" * 12)
    ]
    assert answers[0] == answers[1]
    assert answers[0].endswith("404")
    assert {key["tenant"] for key in beta.client.get("/admin/keys").json()} == {"beta"}
    listed = {key["tenant"] for key in guarded.client.get("/admin/keys").json()}
    assert listed >= {"default", "acme", "beta"}
    for tenant_name in ("acme", "default", "nobody"):
        body = {"tenant": tenant_name, "scopes": ["generate"]}
        assert beta.client.post("/admin/keys", json=body).status_code == httpx.codes.FORBIDDEN
    assert acme.client.delete(f"/admin/keys/{theirs}").json()["state"] == "revoked"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"scopes": []},
        {"scopes": ["root"]},
        {"scopes": ["generate"], "tenant": "public"},
        {"scopes": ["generate"], "tenant": "A/b"},
        {"scopes": ["generate"], "expires_in": 0},
        {"scopes": ["generate"], "expires_in": 1e12},
        {"scopes": ["generate"], "label": "x" * 101},
        {"scopes": ["generate"], "key_id": "mine"},
        {"scopes": ["metrics"], "tenant": "acme"},
    ],
)
def test_keys_that_cannot_be(guarded: LiveServer, body: dict[str, Any]) -> None:
    before = guarded.client.get("/admin/keys").json()
    answer = guarded.client.post("/admin/keys", json=body)
    assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")
    assert guarded.client.get("/admin/keys").json() == before


async def test_a_key_ends_on_every_server_and_goes_on_without_the_store(
    endless: LoadedModel, tmp_path: Path
) -> None:
    valkey = EmbeddedValkey(tmp_path / "external")
    await valkey.start()
    flags = ("--redis-url", valkey.url, "--store-timeout-seconds", "2", "--max-slots", "4")
    with (
        live_server(endless, tmp_path / "a", *flags, auth=True) as first,
        live_server(endless, tmp_path / "a", *flags, auth=True) as second,
    ):

        def answer(server: LiveServer, key: str) -> httpx.Response:
            return httpx.get(f"{server.url}/info", headers=bearer(key))

        def status(server: LiveServer, key: str) -> int:
            return answer(server, key).status_code

        ended, kept, unseen = (make_key(first, "acme", "generate") for _ in range(3))
        for server in (first, second):
            assert status(server, ended["key"]) == status(server, kept["key"]) == 200
        first.client.delete(f"/admin/keys/{ended['key_id']}")
        assert status(first, ended["key"]) == 401, "here at once"
        until(lambda: status(second, ended["key"]), 401)

        assert second.client.get("/info").is_success, "so it knows the operator's key, too"
        await valkey.stop()
        first.wait_until("store_connected", 0)
        second.wait_until("store_connected", 0)
        assert status(second, kept["key"]) == 200, "known"
        assert status(second, ended["key"]) == 401
        not_known = answer(second, unseen["key"])
        assert (not_known.status_code, not_known.json()["error_type"]) == (503, "unavailable")

        await valkey.start()
        until(lambda: status(second, unseen["key"]), 200)


def test_a_key_is_in_no_log_and_not_in_the_store(
    valkey: EmbeddedValkey, endless: LoadedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    with live_server(endless, tmp_path, "--log-level", "debug", auth=True) as server:
        made = make_key(server, "acme", "admin", "generate")
        headers = bearer(made["key"])
        for method, path in (("GET", "/admin/tasks"), ("GET", "/metrics"), ("GET", "/nothing")):
            httpx.request(method, f"{server.url}{path}", headers=headers)
        httpx.post(f"{server.url}/generate", headers=headers, json={"inputs": 1})
        server.client.delete(f"/admin/keys/{made['key_id']}")
        httpx.get(f"{server.url}/info", headers=headers)
        admin = admin_key_file(tmp_path).read_text().strip()
        answers = server.client.get("/admin/keys").text + server.client.get("/metrics").text
    stored = b"".join(
        path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()
    )
    assert made["key_id"].encode() in stored
    for key in (made["key"], admin):
        secret = key.split("-", 2)[2]
        assert secret not in caplog.text
        assert secret not in answers
        assert secret.encode() not in stored


@dataclass
class Owned:
    """A task of the model: who may use it."""

    version: str
    shared: set[str] = field(default_factory=set)


class TenantMachine(RuleBasedStateMachine):
    """Keys and tasks of several tenants in any order, each answer compared with a plain model."""

    server: LiveServer
    prefixes: list[Prefix]
    numbers = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        number = next(self.numbers)
        self.names = ["default", f"acme-{number}", f"beta-{number}"]
        self.tasks: dict[tuple[str, str], Owned] = {}
        self.keys = {
            (name, scope): make_key(self.server, name, scope)
            for name in self.names
            for scope in ("admin", "generate")
        }
        self.task_names = [f"one-{number}", f"two-{number}"]

    @rule(who=st.integers(0, 2), scope=st.sampled_from(["admin", "generate"]))
    def new_key(self, who: int, scope: str) -> None:
        """The one before is revoked."""
        key = (self.names[who], scope)
        old = self.keys[key]
        self.keys[key] = make_key(self.server, *key)
        self.server.client.delete(f"/admin/keys/{old['key_id']}").raise_for_status()
        refused = self.server.client.get("/info", headers=bearer(old["key"]))
        assert refused.status_code == httpx.codes.UNAUTHORIZED

    @rule(who=st.integers(0, 2), which=st.integers(0, 1), prefix=st.integers(0, 2))
    def upload(self, who: int, which: int, prefix: int) -> None:
        owner, name = self.names[who], self.task_names[which]
        data = self.prefixes[prefix].to_bytes()
        answer = self._ask(owner, "admin", "PUT", f"/admin/tasks/{name}", files={"file": data})
        assert answer.status_code == httpx.codes.CREATED
        version = answer.json()["version"]
        self.tasks.setdefault((owner, name), Owned(version)).version = version

    @rule(
        who=st.integers(0, 2),
        which=st.integers(0, 1),
        shared=st.sets(st.sampled_from([0, 1, 2, "public"])),
    )
    def share(self, who: int, which: int, shared: set[Any]) -> None:
        owner, name = self.names[who], self.task_names[which]
        tenants = [one if one == "public" else self.names[one] for one in shared]
        path = f"/admin/tasks/{name}/sharing"
        answer = self._ask(owner, "admin", "PUT", path, json={"tenants": tenants})
        if (owner, name) not in self.tasks:
            assert answer.status_code == httpx.codes.NOT_FOUND
            return
        self.tasks[owner, name].shared = set(tenants)

    @rule(who=st.integers(0, 2), which=st.integers(0, 1))
    def delete(self, who: int, which: int) -> None:
        owner, name = self.names[who], self.task_names[which]
        answer = self._ask(owner, "admin", "DELETE", f"/admin/tasks/{name}")
        found = self.tasks.pop((owner, name), None)
        assert answer.status_code == (204 if found else 404)

    @rule(who=st.integers(0, 2), owner=st.integers(-1, 2), which=st.integers(0, 1))
    def generate(self, who: int, owner: int, which: int) -> None:
        """By its own name (-1), or by that of another tenant's task or of its own in full."""
        asker, name = self.names[who], self.task_names[which]
        called = name if owner < 0 else f"{self.names[owner]}/{name}"
        task = self.tasks.get((asker if owner < 0 else self.names[owner], name))
        body = {"inputs": "Hi", "task_id": called, "parameters": FEW}
        answer = self._ask(asker, "generate", "POST", "/generate", json=body)
        is_own = owner in (-1, who)
        if task is not None and (is_own or task.shared & {asker, "public"}):
            assert answer.status_code == httpx.codes.OK, answer.text
            assert answer.json()["version"] == task.version
        else:
            assert answer.status_code == httpx.codes.NOT_FOUND
            assert answer.json() == {
                "error": f"no task {called!r}: upload its prefix, or check the name",
                "error_type": "not_found",
            }

    @rule(who=st.integers(0, 2))
    def list_tasks(self, who: int) -> None:
        owner = self.names[who]
        listed = self._ask(owner, "admin", "GET", "/admin/tasks").json()
        own = {name: task.version for (other, name), task in self.tasks.items() if other == owner}
        found = {task["task_id"]: task["version"] for task in listed}
        assert {name: found.get(name) for name in self.task_names} == {
            name: own.get(name) for name in self.task_names
        }
        if owner != "default":
            assert found == own

    @rule(who=st.integers(0, 2))
    def the_other_scope_does_not_do(self, who: int) -> None:
        owner = self.names[who]
        assert self._ask(owner, "generate", "GET", "/admin/tasks").status_code == 403
        body = {"inputs": "Hi", "parameters": FEW}
        assert self._ask(owner, "admin", "POST", "/generate", json=body).status_code == 403

    def _ask(self, owner: str, scope: str, method: str, path: str, **body: Any) -> httpx.Response:
        headers = bearer(self.keys[owner, scope]["key"])
        return self.server.client.request(method, path, headers=headers, **body)


def test_nobody_ever_sees_what_is_neither_theirs_nor_shared(
    guarded: LiveServer, prefixes: dict[str, Prefix]
) -> None:
    members = {"server": guarded, "prefixes": list(prefixes.values())}
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        type("Machine", (TenantMachine,), members),
        settings=settings(
            max_examples=10,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
