"""`deploy/ray` on this machine, as `make ray-demo` starts it: two replicas behind Ray's proxy."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from clients import Client, UnavailableError
from clients._calls import TASK_HEADER
from prefix_store.data_dir import admin_key_file
from prefix_store.prefix import Prefix

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
SLOTS = 4
LONG = 1000  # tokens of a request that still runs when the test does something about it
START_SECONDS = 280
DEADLINE_SECONDS = 60
HTTP = httpx.Client()  # making one takes longer than a request


@dataclass(frozen=True)
class Demo:
    """A running demo.

    Attributes:
        url: where Ray's proxy listens.
        own: where each replica listens itself, by its rank.
    """

    url: str
    own: tuple[str, str]
    key: str
    process: subprocess.Popen[bytes]

    def client(self, url: str | None = None, max_retries: int = 8) -> Client:
        """The product's own client."""
        return Client(url or self.url, api_key=self.key, max_retries=max_retries)

    def http(self, url: str | None = None) -> httpx.Client:
        """A client that shows headers."""
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx.Client(base_url=url or self.url, headers=headers, timeout=DEADLINE_SECONDS)

    def metric(self, replica: int, name: str, **labels: str) -> float:
        """A metric of a replica's, or 0."""
        with self.http(self.own[replica]) as http:
            text = http.get("/metrics").raise_for_status().text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == f"prefixserve_{name}" and labels.items() <= sample.labels.items()
        )

    def pid(self, replica: int) -> int | None:
        """The process that listens at a replica's own address."""
        port = int(self.own[replica].rpartition(":")[2])
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                found = child.net_connections("tcp")
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            if any(one.laddr.port == port and one.status == psutil.CONN_LISTEN for one in found):
                return int(child.pid)
        return None


def until(is_so: Callable[[], bool], seconds: float = DEADLINE_SECONDS) -> None:
    """Poll until something is so."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def free_ports(count: int) -> int:
    """The first of some free ports in a row."""
    while True:
        first = random.randrange(20_000, 30_000)
        try:
            for port in range(first, first + count):
                with socket.socket() as listener:
                    listener.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first


def is_ready(url: str) -> bool:
    try:
        return HTTP.get(f"{url}/health/ready").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def started(process: subprocess.Popen[bytes], *urls: str) -> bool:
    """Wait until a process answers everywhere; false if it ends or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if all(map(is_ready, urls)):
            return True
        time.sleep(0.2)
    return False


@pytest.fixture(scope="module")
def model_dir(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with room for long texts."""
    folder = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(tiny_llama_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = LONG + 100
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def demo(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """Two replicas; what was started has ended afterwards."""
    folder = tmp_path_factory.mktemp("ray")
    port = free_ports(3)
    command = [sys.executable, "-m", "deploy.ray.demo", "--replicas", "2", "--port", str(port)]
    command += ["--model", str(model_dir), "--dtype", "float32", "--data-dir", str(folder)]
    command += ["--max-slots", str(SLOTS), "--max-length", str(LONG + 100)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, env=environment)
    url, *own = (f"http://127.0.0.1:{number}" for number in range(port, port + 3))
    try:
        assert started(process, url, *own), log.read_text()
        key = admin_key_file(folder).read_text().strip()
        yield Demo(url, (own[0], own[1]), key, process)
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        assert process.wait(DEADLINE_SECONDS) == 0, log.read_text()
        assert psutil.wait_procs(children, DEADLINE_SECONDS)[1] == []
    finally:
        process.kill()
        process.wait()


def random_prefix(seed: int) -> Prefix:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn((2, 2, 4, 16), generator=generator) for _ in range(2))
    return Prefix.of(keys, values, method="random")


def test_an_upload_through_one_replica_is_served_by_the_other(demo: Demo) -> None:
    with demo.client(demo.own[0]) as first, demo.client(demo.own[1]) as second:
        version = first.upload("shared", random_prefix(1)).version
        until(lambda: any(task.version == version for task in second.tasks()))
        texts = [
            client.generate("Hello", task_id="shared", max_new_tokens=8).generated_text
            for client in (first, second)
        ]
    with demo.client() as client:
        answer = client.generate("Hello", task_id="shared", max_new_tokens=8)
    assert {*texts, answer.generated_text} == {texts[0]}
    assert answer.details.version == version


def held_by_one(demo: Demo, task: str) -> str:
    """Upload a task and ask for it once; the replica that has its prefix, once Ray knows that."""
    with demo.client() as client, demo.http() as http:
        version = client.upload(task, random_prefix(sum(task.encode()))).version
        for own in demo.own:
            with demo.client(own) as replica:
                until(lambda: replica.task(task).version == version)
        holder = ask(http, task).headers["x-replica"]
        # What is refused is routed by its header like any other request, and loads nothing.
        until(lambda: {refused(http, task) for _ in range(10)} == {holder})
    return holder


def ask(http: httpx.Client, task: str, **parameters: Any) -> httpx.Response:
    body = {"inputs": "Hello", "task_id": task, "parameters": {"max_new_tokens": 2, **parameters}}
    return http.post("/generate", json=body, headers={TASK_HEADER: task}).raise_for_status()


def refused(http: httpx.Client, task: str) -> str:
    answer = http.post("/generate", json={}, headers={TASK_HEADER: task})
    assert answer.status_code == httpx.codes.UNPROCESSABLE_ENTITY
    return str(answer.headers["x-replica"])


def loads(demo: Demo) -> float:
    return sum(
        demo.metric(replica, "prefix_cache_misses_total", tier="device") for replica in (0, 1)
    )


def test_requests_go_to_the_replica_that_has_the_tasks_prefix(demo: Demo) -> None:
    before = loads(demo)
    tasks = [f"routed-{number}" for number in range(4)]
    holders = {task: held_by_one(demo, task) for task in tasks}
    assert len(set(holders.values())) == 2
    with demo.http() as http:
        for task in tasks * 5:
            assert ask(http, task).headers["x-replica"] == holders[task]
    assert loads(demo) - before == len(tasks)


def test_requests_go_elsewhere_where_that_replica_is_full(demo: Demo) -> None:
    holder = held_by_one(demo, "wanted")
    with demo.http() as http, ThreadPoolExecutor(2 * SLOTS) as threads:
        many = [threads.submit(ask, http, "wanted", max_new_tokens=LONG) for _ in range(2 * SLOTS)]
        answered_by = {one.result().headers["x-replica"] for one in many}
    assert len(answered_by) == 2
    assert holder in answered_by


def test_a_stream_comes_through_and_ends_with_its_client(demo: Demo) -> None:
    def gone() -> float:
        return sum(demo.metric(replica, "requests_total", status="499") for replica in (0, 1))

    before = gone()
    with demo.client() as client:
        tokens = client.stream("Hello", max_new_tokens=LONG, ignore_eos=True)
        assert [next(tokens).index for _ in range(3)] == [1, 2, 3]
        tokens.close()
    until(lambda: gone() == before + 1)


@pytest.mark.parametrize("header", ["X-Task-Id", "X-Request-Id", "serve_multiplexed_model_id"])
def test_headers_that_are_no_text_do_no_harm(demo: Demo, header: str) -> None:
    with demo.http() as http:
        answer = http.get("/info", headers=[(header.encode(), b"\xff%ff\xfe")])
    assert answer.status_code == httpx.codes.OK
    assert len(answer.headers.get_list("x-request-id")) == 1


@pytest.mark.parametrize("path", ["/metrics", "/v1/files", "/v1/batches/b/cancel"])
def test_what_one_replica_has_is_asked_of_that_one(demo: Demo, path: str) -> None:
    with demo.http() as http:
        answer = http.get(path)
    assert answer.status_code == httpx.codes.MISDIRECTED_REQUEST
    assert "at its own address" in answer.text


def a_task_each(demo: Demo) -> tuple[str, str]:
    """A task whose prefix the first replica alone has, and one of the second's."""
    found: dict[str, str] = {}
    for number in range(20):  # new tasks go to whichever has fewer
        task = f"own-{number}"
        found.setdefault(held_by_one(demo, task), task)
        if len(found) == 2:
            break
    of_second, of_first = (
        [task for task in found.values() if (demo.metric(1, "requests_total", task=task) > 0) is at]
        for at in (True, False)
    )
    return of_first[0], of_second[0]


def test_a_killed_replica_loses_its_requests_alone_and_comes_back(demo: Demo) -> None:
    lost, kept = a_task_each(demo)
    pid = demo.pid(0)
    assert pid is not None

    def generated(client: Client, task: str) -> str:
        return client.generate(
            "Hello", task_id=task, max_new_tokens=LONG, ignore_eos=True
        ).generated_text

    with (
        demo.client() as patient,
        demo.client(max_retries=0) as hasty,
        ThreadPoolExecutor(2 * SLOTS) as threads,
    ):
        expected = {task: generated(hasty, task) for task in (lost, kept)}
        retried = [threads.submit(generated, patient, lost) for _ in range(SLOTS - 1)]
        given_up = threads.submit(generated, hasty, lost)
        beside = [threads.submit(generated, hasty, kept) for _ in range(SLOTS)]
        until(lambda: all(demo.metric(one, "running_requests") == SLOTS for one in (0, 1)))
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(UnavailableError, match="has died"):
            given_up.result()
        assert {one.result() for one in beside} == {expected[kept]}
        assert {one.result() for one in retried} == {expected[lost]}
        until(lambda: is_ready(demo.own[0]), START_SECONDS)
        assert demo.pid(0) not in {pid, None}
        with demo.client(demo.own[0]) as returned:
            assert generated(returned, lost) == expected[lost]
