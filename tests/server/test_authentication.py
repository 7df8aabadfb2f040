"""Who is let in, and to what."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from prefix_store.api_key import Scope, kept_of, new_key_text
from prefix_store.directory import Directory
from prefix_store.embedded import EmbeddedValkey
from prefix_store.model_loading import LoadedModel
from prefix_store.redis_store import RedisPrefixStore
from server.api import dependencies
from server.api.authentication import OPEN_PATHS
from server.app import create_app
from server.authentication import Authenticator
from server.callers import ANYBODY, Caller
from server.errors import AuthenticationError, ForbiddenError, InvalidRequestError
from server.keys import KeyService
from server.services import running_services
from server.settings import load_settings
from tests.server.live import LiveServer, bearer, live_server

OPERATOR = Caller("default", "op", frozenset({Scope.ADMIN}))
NEVER_MADE = "ps-000000000000-" + "A" * 43


@pytest.fixture(scope="module")
def guarded(endless: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server that asks for keys."""
    with live_server(endless, tmp_path_factory.mktemp("guarded"), auth=True) as server:
        yield server


def make_key(server: LiveServer, *scopes: str, **fields: Any) -> str:
    answer = server.client.post("/admin/keys", json={"scopes": list(scopes), **fields})
    assert answer.status_code == httpx.codes.CREATED, answer.text
    return str(answer.json()["key"])


def asked(server: LiveServer, key: str | None, method: str, path: str, **body: Any) -> int:
    """The status of a request with this key."""
    headers = {} if key is None else bearer(key)
    return httpx.request(method, f"{server.url}{path}", headers=headers, **body).status_code


# Some of what each scope opens.
BODY = {"json": {"inputs": "Hi", "parameters": {"max_new_tokens": 1}}}
ROUTES: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
    "generate": [
        ("POST", "/generate", BODY),
        ("POST", "/generate_stream", BODY),
        ("POST", "/", BODY),
    ],
    "admin": [("GET", "/admin/tasks", {}), ("GET", "/admin/keys", {})],
    "metrics": [("GET", "/metrics", {})],
}


@pytest.mark.parametrize("scope", list(ROUTES))
def test_a_scope_opens_its_routes_and_no_others(guarded: LiveServer, scope: str) -> None:
    key = make_key(guarded, scope)
    assert asked(guarded, key, "GET", "/info") == 200
    for wanted, routes in ROUTES.items():
        for method, path, body in routes:
            may = scope == wanted or (scope, wanted) == ("admin", "metrics")  # the operator's
            assert asked(guarded, key, method, path, **body) == (200 if may else 403), path


def test_what_is_refused_says_why_in_the_one_shape(guarded: LiveServer) -> None:
    missing = httpx.post(f"{guarded.url}/generate", content=b"{not even JSON")
    assert (missing.status_code, missing.headers["www-authenticate"]) == (401, "Bearer")
    assert missing.json() == {
        "error": "there is no Authorization header; send Authorization: Bearer and an API key",
        "error_type": "authentication",
    }
    wrong = httpx.get(f"{guarded.url}/info", headers=bearer(NEVER_MADE))
    assert (wrong.status_code, wrong.headers["www-authenticate"]) == (401, "Bearer")
    assert NEVER_MADE not in wrong.text
    key = make_key(guarded, "generate")
    narrow = httpx.get(f"{guarded.url}/admin/tasks", headers=bearer(key))
    assert (narrow.status_code, narrow.json()["error_type"]) == (403, "forbidden")
    assert "scope admin" in narrow.json()["error"]
    assert key not in narrow.text


def test_only_health_and_the_description_are_open(guarded: LiveServer) -> None:
    for path in ("/health/live", "/health/ready", "/openapi.json", "/docs"):
        assert asked(guarded, None, "GET", path) == 200
    for path in ("/", "/info", "/metrics", "/nothing", "/health", "/health/live/", "//health/live"):
        assert asked(guarded, None, "GET", path) == 401, path


def test_a_large_body_is_not_read_without_a_key(guarded: LiveServer) -> None:
    """The answer comes while most of the body is still to be sent."""
    host, port = guarded.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(
            b"PUT /admin/tasks/x HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x"
        )
        assert connection.recv(4096).startswith(b"HTTP/1.1 401 ")


def raw_status(server: LiveServer, *headers: bytes) -> int:
    """The status of `GET /info` with exactly these header lines."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        lines = [b"GET /info HTTP/1.1", b"Host: x", b"Connection: close", *headers]
        connection.sendall(b"\r\n".join([*lines, b"", b""]))
        return int(connection.makefile("rb").readline().split()[1])


def test_headers_that_mean_the_key(guarded: LiveServer) -> None:
    key = make_key(guarded, "generate").encode()
    for line in (
        b"Authorization: Bearer " + key,
        b"authorization: bearer " + key,
        b"AUTHORIZATION:BEARER   " + key + b"  ",
    ):
        assert raw_status(guarded, line) == 200, line


def test_headers_that_smuggle_or_are_odd(guarded: LiveServer) -> None:
    key = make_key(guarded, "generate").encode()
    good = b"Authorization: Bearer " + key
    for lines in (
        [b"Authorization: Bearer"],
        [b"Authorization: "],
        [b"Authorization: " + key],
        [b"Authorization: Basic " + key],
        [b"Authorization: Bearer\t" + key],
        [b"Authorization: Bearer " + key + b", Bearer " + key],
        [b"Authorization: Bearer " + key + b" x"],
        [b"Authorization: Bearer " + key + b"\xa0"],
        [b"Authorization: Bearer \xff" + key],
        ["Authorization: Bearer é".encode() + key],
        [b"Authorization: Bearer " + key.upper()],
        [b"Authorization: Bearer " + key + b"A"],
        [b"Authorization: Bearer " + key[:-1]],
        [b"Authorization: Bearer " + b"A" * 30_000],
        [b"X-Authorization: Bearer " + key],
        [b"Proxy-Authorization: Bearer " + key],
        [good, good],
        [b"Authorization: Bearer " + NEVER_MADE.encode(), good],
        [good, b"authorization: Basic eDp4"],
    ):
        assert raw_status(guarded, *lines) == 401, lines
    for line in (  # refused by the parser, before there is a request
        b"Authorization : Bearer " + key,
        b"Authorization: Bearer " + key + b"\x00",
        b"Authorization: Bearer\r\n " + key,
    ):
        assert raw_status(guarded, line) in (400, 401), line
    assert raw_status(guarded, b"X: y", good) == 200


def test_a_key_in_the_query_or_the_body_does_not_count(guarded: LiveServer) -> None:
    key = make_key(guarded, "generate")
    assert asked(guarded, None, "GET", f"/info?api_key={key}&Authorization=Bearer%20{key}") == 401
    assert asked(guarded, None, "POST", "/generate", json={"inputs": "x", "api_key": key}) == 401


def test_refusals_are_counted(guarded: LiveServer) -> None:
    before = guarded.metric("refused_keys_total")
    asked(guarded, None, "GET", "/info")
    asked(guarded, NEVER_MADE, "GET", "/info")
    assert guarded.metric("refused_keys_total") == before + 2


async def test_expiry_and_revocation_on_a_clock(tmp_path: Path) -> None:
    now = 1_000_000.0
    async with EmbeddedValkey(tmp_path) as valkey:
        store = RedisPrefixStore.from_url(valkey.url)
        directory = Directory(store)
        await directory.start()
        keys = KeyService(store.keys, directory.keys, clock=lambda: now)
        authenticate = Authenticator(directory.keys, clock=lambda: now)

        text, made = await keys.create(
            OPERATOR, tenant="acme", scopes=[Scope.GENERATE], label="", expires_in=60
        )
        header = [f"Bearer {text}".encode()]
        assert await authenticate(header) == Caller("acme", made.key_id, made.scopes)
        now += 59.9
        await authenticate(header)
        now += 0.1
        with pytest.raises(AuthenticationError, match="expired"):
            await authenticate(header)

        text, made = await keys.create(
            OPERATOR, tenant="acme", scopes=[Scope.GENERATE], label="", expires_in=None
        )
        header = [f"Bearer {text}".encode()]
        now += 1e9
        await authenticate(header)
        await keys.revoke(OPERATOR, made.key_id)
        with pytest.raises(AuthenticationError, match="revoked"):
            await authenticate(header)
        assert (await keys.revoke(OPERATOR, made.key_id)).revoked_at == now, "again changes nothing"
        await directory.close()
        await store.close()


async def test_who_makes_which_keys(tmp_path: Path) -> None:
    async with EmbeddedValkey(tmp_path) as valkey:
        store = RedisPrefixStore.from_url(valkey.url)
        directory = Directory(store)
        await directory.start()
        keys = KeyService(store.keys, directory.keys)
        acme = Caller("acme", "a", frozenset({Scope.ADMIN}))

        async def create(caller: Caller, tenant: str | None, *scopes: Scope) -> str:
            made = await keys.create(
                caller, tenant=tenant, scopes=scopes, label="", expires_in=None
            )
            return made[1].tenant

        assert await create(acme, None, Scope.ADMIN) == "acme"
        assert await create(OPERATOR, "acme", Scope.ADMIN) == "acme"
        assert await create(OPERATOR, None, Scope.METRICS) == "default"
        for tenant in ("default", "beta"):
            with pytest.raises(ForbiddenError):
                await create(acme, tenant, Scope.GENERATE)
        with pytest.raises(InvalidRequestError, match="metrics"):
            await create(acme, None, Scope.METRICS)
        assert {key.tenant for key in await keys.list(acme)} == {"acme"}
        assert len(await keys.list(OPERATOR)) == 3
        await directory.close()
        await store.close()


def test_metrics_are_the_operators_whatever_a_key_says() -> None:
    assert not Caller("acme", "a", frozenset(Scope)).may(Scope.METRICS)
    assert Caller("default", "a", frozenset({Scope.METRICS})).may(Scope.METRICS)
    assert OPERATOR.may(Scope.METRICS)
    assert ANYBODY.may(Scope.METRICS)


def test_a_key_is_kept_as_it_was_made() -> None:
    text = new_key_text()
    key = kept_of(text, "acme", Scope, label="x", now=1.0, expires_at=2.0)
    assert (key.tenant, key.label, key.created_at, key.expires_at) == ("acme", "x", 1.0, 2.0)


async def test_no_route_can_be_left_out_by_mistake(endless: LoadedModel, tmp_path: Path) -> None:
    """A route that somebody adds is for nobody until it says for whom."""
    kinds = ("AnyCaller", "GenerateCaller", "AdminCaller", "MetricsCaller")
    known = {getattr(dependencies, kind).__metadata__[0].dependency for kind in kinds}

    def called(dependant: Dependant) -> Iterator[object]:
        for inner in dependant.dependencies:
            yield inner.call
            yield from called(inner)

    settings = load_settings(["--data-dir", str(tmp_path), "--no-demo-tasks"])
    async with running_services(settings, endless) as services:
        app = create_app(services)
        for route in app.routes:
            if isinstance(route, APIRoute) and route.path not in OPEN_PATHS:
                assert known & set(called(route.dependant)), route.path

        # The caller has no default: without authentication in front a request fails.
        app.user_middleware.clear()
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            assert (await client.get("/info")).status_code == 500
            assert (await client.get("/health/live")).status_code == 200
