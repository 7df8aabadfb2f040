"""`deploy/nginx` sends tasks to replicas, with the real nginx."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from benchmarks.balancing import NGINX, ask, balancer
from clients import Client
from clients._calls import TASK_HEADER
from clients.cli import app
from prefix_store.prefix import Prefix
from tests.clients.faulty_server import FaultyServer, answer, drop, faulty_server, refuse
from tests.deploy.conftest import ROOM
from tests.server_process import ServerProcess, free_port

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")

TASKS = [f"task-{number}" for number in range(60)]
REQUESTS = 480
CLIENTS = 4
OK = answer(200, {"generated_text": "hello"})


@pytest.fixture(scope="module")
def registered(
    replicas: list[ServerProcess], key: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The tasks, uploaded through the balancer."""
    generator = torch.Generator().manual_seed(5)
    with (
        balancer(tmp_path_factory.mktemp("nginx"), urls(replicas)) as url,
        Client(url, api_key=key) as client,
    ):
        for task in TASKS:
            keys, values = (torch.randn((2, 2, 4, 16), generator=generator) for _ in range(2))
            client.upload(task, Prefix.of(keys, values, method="random"))


def urls(replicas: list[ServerProcess]) -> list[str]:
    return [replica.url for replica in replicas]


def metrics_of(replica: ServerProcess, key: str) -> str:
    with Client(replica.url, api_key=key) as client:
        return client.metrics()


def counted(replicas: list[ServerProcess], name: str) -> float:
    """A counter of the device tier, of both replicas together."""
    key = replicas[0].key
    return sum(
        sample.value
        for replica in replicas
        for family in text_string_to_metric_families(metrics_of(replica, key))
        for sample in family.samples
        if sample.name == f"prefixserve_{name}" and sample.labels == {"tier": "device"}
    )


def hit_rate(replicas: list[ServerProcess], folder: Path, *, hashed: bool) -> float:
    """Of requests for tasks drawn uniformly."""
    names = ("prefix_cache_hits_total", "prefix_cache_misses_total")
    drawn = random.Random(1).choices(TASKS, k=REQUESTS)
    before = [counted(replicas, name) for name in names]
    with balancer(folder, urls(replicas), hashed=hashed) as url:
        asyncio.run(ask(url, drawn, CLIENTS, replicas[0].key))
    hits, misses = (
        counted(replicas, name) - then for name, then in zip(names, before, strict=True)
    )
    assert hits + misses == REQUESTS
    return hits / REQUESTS


@pytest.mark.usefixtures("registered")
def test_hashing_tasks_has_the_room_of_both_replicas(
    replicas: list[ServerProcess], tmp_path_factory: pytest.TempPathFactory
) -> None:
    spread, hashed = (
        hit_rate(replicas, tmp_path_factory.mktemp("nginx"), hashed=hashed)
        for hashed in (False, True)
    )
    # Uniformly, a cache has what is asked for as often as it has room for all tasks.
    assert spread == pytest.approx(ROOM / len(TASKS), abs=0.07)
    assert hashed == pytest.approx(2 * ROOM / len(TASKS), abs=0.07)


@pytest.mark.usefixtures("registered")
def test_the_header_chooses_a_replica_and_not_the_task(
    replicas: list[ServerProcess], tmp_path: Path
) -> None:
    body = {"inputs": "Hello", "task_id": TASKS[0], "parameters": {"max_new_tokens": 4}}
    with (
        balancer(tmp_path, urls(replicas)) as url,
        httpx.Client(base_url=url, headers=replicas[0].headers) as http,
    ):
        answers = [
            http.post("/generate", json=body, headers=headers)
            for headers in ({}, *({TASK_HEADER: task} for task in (*TASKS[:8], "../x\t;%00", "%")))
        ]
    assert {found.status_code for found in answers} == {200}
    assert len({found.text for found in answers}) == 1
    assert answers[0].json()["task_id"] == TASKS[0]
    served = {line.rsplit("replica=")[1] for line in read_log(tmp_path)}
    assert len(served) == 2


def read_log(folder: Path) -> list[str]:
    return (folder / "access.log").read_text().splitlines()


@pytest.fixture
def scripted() -> Iterator[list[FaultyServer]]:
    """Three servers that answer as they are told."""
    with ExitStack() as opened:
        yield [opened.enter_context(faulty_server()) for _ in range(3)]


def replica_of(folder: Path, scripted: list[FaultyServer], tasks: list[str]) -> dict[str, str]:
    """Which server each task's requests go to."""
    for server in scripted:
        server.script(*[OK] * len(tasks))
        server.requests.clear()
    with balancer(folder, [server.url for server in scripted]) as url:
        asyncio.run(ask_raw(url, tasks))
    return {
        headers[TASK_HEADER.lower()]: server.url
        for server in scripted
        for _, _, headers, _ in server.requests
    }


async def ask_raw(url: str, tasks: list[str]) -> None:
    async with httpx.AsyncClient(base_url=url) as http:
        for task in tasks:
            await http.post("/generate", json={}, headers={TASK_HEADER: task})


def test_a_replica_that_goes_moves_only_its_own_tasks(
    scripted: list[FaultyServer], tmp_path_factory: pytest.TempPathFactory
) -> None:
    before = replica_of(tmp_path_factory.mktemp("nginx"), scripted, TASKS)
    after = replica_of(tmp_path_factory.mktemp("nginx"), scripted[:2], TASKS)
    assert set(before) == set(after) == set(TASKS)
    assert min(Counter(before.values()).values()) > len(TASKS) / 10
    gone = scripted[2].url
    assert all(after[task] == before[task] for task in TASKS if before[task] != gone)


@pytest.mark.parametrize("fault", [refuse(429), refuse(503), drop])
def test_a_request_goes_to_the_next_replica_where_its_own_cannot_take_it(
    scripted: list[FaultyServer], tmp_path: Path, fault: object
) -> None:
    body = {"inputs": "Hello" * 10_000, "task_id": "task"}
    for server in scripted:
        server.script(OK)
    with balancer(tmp_path, [server.url for server in scripted]) as url:

        def status() -> int:
            headers = {TASK_HEADER: "task"}
            return httpx.post(f"{url}/generate", json=body, headers=headers).status_code

        assert status() == 200
        [own] = [server for server in scripted if server.requests]
        own.script(fault)  # type: ignore[arg-type]
        assert status() == 200
    assert sorted(len(server.requests) for server in scripted) == [0, 1, 2]
    sent = [content for server in scripted for _, _, _, content in server.requests]
    assert all(json.loads(content) == body for content in sent)


@pytest.mark.parametrize("path", ["/admin/tasks/a/rollback", "/v1/load_lora_adapter"])
@pytest.mark.parametrize("fault", [refuse(429), refuse(503), drop])
def test_a_change_is_never_sent_twice(
    scripted: list[FaultyServer], tmp_path: Path, fault: object, path: str
) -> None:
    for server in scripted:
        server.script(fault)  # type: ignore[arg-type]
    with balancer(tmp_path, [server.url for server in scripted]) as url:
        assert httpx.post(f"{url}{path}").status_code in {429, 502, 503}
    assert sum(len(server.requests) for server in scripted) == 1


BATCH_CALLS = [
    ("POST", "/v1/files"),
    ("GET", "/v1/files?limit=3"),
    ("GET", "/v1/files/file-1/content"),
    ("DELETE", "/v1/files/file-1"),
    ("POST", "/v1/batches"),
    ("POST", "/v1/batches/batch-1/cancel"),
]


def test_files_and_batches_go_to_one_replica(scripted: list[FaultyServer], tmp_path: Path) -> None:
    own, *others = scripted
    own.script(*[OK] * len(BATCH_CALLS) * 4, drop, refuse(503))
    with (
        balancer(tmp_path, [server.url for server in scripted]) as url,
        httpx.Client(base_url=url) as http,
    ):
        for method, path in BATCH_CALLS:
            for task in TASKS[:4]:
                answer = http.request(method, path, headers={TASK_HEADER: task})
                assert answer.status_code == 200, path
        lost, full = http.get("/v1/files"), http.get("/v1/files")
    assert (lost.status_code, full.status_code) == (502, 503)
    assert [server.requests for server in others] == [[], []]


@pytest.mark.usefixtures("registered")
def test_a_batch_runs_behind_the_balancer(
    replicas: list[ServerProcess], key: str, tmp_path: Path
) -> None:
    body = {"model": TASKS[0], "prompt": "Hello", "max_tokens": 2}
    line = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": body}
    requests, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_text(json.dumps(line))
    with balancer(tmp_path, urls(replicas)) as url:
        command = ["batch", "run", str(requests), str(answers), "--url", url, "--interval", "0.1"]
        done = CliRunner().invoke(app, command, env={"PREFIXSERVE_API_KEY": key})
    assert done.exit_code == 0, done.output
    assert json.loads(answers.read_text())["response"]["status_code"] == 200


def test_a_replica_that_is_gone_is_passed_over(
    scripted: list[FaultyServer], tmp_path: Path
) -> None:
    here, gone = scripted[0], f"http://127.0.0.1:{free_port()}"
    here.script(*[OK] * 20)
    with balancer(tmp_path, [here.url, gone]) as url:
        asyncio.run(ask_raw(url, TASKS[:20]))
    assert len(here.requests) == 20


def test_tokens_come_through_as_they_are_generated(
    scripted: list[FaultyServer], tmp_path: Path
) -> None:
    received = threading.Event()

    def stream(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.end_headers()
        handler.wfile.write(b"data: 1\n\n")
        handler.wfile.flush()
        assert received.wait(30)
        handler.wfile.write(b"data: 2\n\n")
        handler.close_connection = True

    scripted[0].script(stream)
    with (
        balancer(tmp_path, [scripted[0].url]) as url,
        httpx.stream("POST", f"{url}/generate_stream", json={}, timeout=60) as answer,
    ):
        lines = answer.iter_lines()
        assert next(lines) == "data: 1"
        received.set()
        assert [line for line in lines if line] == ["data: 2"]


def test_metrics_are_not_published(scripted: list[FaultyServer], tmp_path: Path) -> None:
    with balancer(tmp_path, [scripted[0].url]) as url:
        assert httpx.get(f"{url}/metrics").status_code == 404
    assert scripted[0].requests == []
