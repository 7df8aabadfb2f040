"""What was acknowledged survives `kill -9` of the uploader, of its store, and of both."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import httpx
import psutil
import pytest
from redis.asyncio import Redis
from transformers import AutoConfig, AutoModelForCausalLM

from prefix_store.base_model import BaseModelSpec
from prefix_store.checkup import check_store
from prefix_store.data_dir import store_dir
from prefix_store.embedded import EmbeddedValkey
from prefix_store.prefix import version_of
from prefix_store.redis_store import RedisPrefixStore, layout
from prefix_store.redis_store.layout import Blob
from tests.prefix_store.crash_worker import bytes_of, upload_until_killed
from tests.prefix_store.examples import SPEC, a_prefix
from tests.server_process import running_server

KILLS = 205
CHECK_EVERY = 25
SEED = 99
VICTIMS = ["uploader", "store", "both"]
DEADLINE_SECONDS = 60


@dataclass
class Worker:
    """A running `upload_until_killed`."""

    process: BaseProcess
    hears: Connection
    valkey: int | None = None

    def wait_until_started(self) -> None:
        """Return once its store runs."""
        assert self.hears.poll(DEADLINE_SECONDS)
        self.valkey = int(self.hears.recv_bytes())

    def acknowledged(self, seconds: float) -> list[int]:
        """Numbers told in so many seconds; fewer seconds if it ends."""
        numbers = []
        until = time.monotonic() + seconds
        with suppress(EOFError):
            while self.hears.poll(max(0.0, until - time.monotonic())):
                number = int(self.hears.recv_bytes())
                if self.valkey is None:
                    self.valkey = number
                else:
                    numbers.append(number)
        return numbers

    def kill(self, victim: str) -> None:
        """SIGKILL; returns when the worker has ended, by itself when its store was killed."""
        assert self.process.pid is not None
        if victim != "uploader":
            assert self.valkey is not None
            os.kill(self.valkey, signal.SIGKILL)
        if victim != "store":
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.join(DEADLINE_SECONDS)
        assert self.process.exitcode in (0, -signal.SIGKILL)


@contextmanager
def working(data_dir: Path, first: int) -> Iterator[Worker]:
    # A process forked from one that has everything imported starts in milliseconds.
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.prefix_store.crash_worker"])
    hears, told = context.Pipe(duplex=False)
    process = context.Process(target=upload_until_killed, args=(data_dir, first, told))
    process.start()
    told.close()
    with hears:
        try:
            yield Worker(process, hears)
        finally:
            process.kill()
            process.join()


def check(
    data_dir: Path, expected: dict[str, str], attempted: set[str], spec: BaseModelSpec
) -> None:
    """The store in `data_dir` has every expected task, whole, and nothing half done.

    Args:
        spec: what the prefixes are made for.
        expected: task to version, of what was acknowledged.
        attempted: what may be there as well.
    """
    asyncio.run(_check(data_dir, expected, attempted, spec))


async def _check(
    data_dir: Path, expected: dict[str, str], attempted: set[str], spec: BaseModelSpec
) -> None:
    async with EmbeddedValkey(data_dir) as valkey, Redis.from_url(valkey.url) as redis:
        store = RedisPrefixStore.from_url(valkey.url)
        tasks = {task.task_id: task.version for task in await store.list()}
        assert expected.items() <= tasks.items()
        assert tasks.keys() <= attempted
        for version in set(tasks.values()):
            assert version_of(await store.read(version)) == version
        await consult_doctor(store, spec)
        await collect_everything(store, redis)
        await consult_doctor(store, spec)
        await store.close()


async def consult_doctor(store: RedisPrefixStore, spec: BaseModelSpec) -> None:
    """`prefixserve doctor` finds nothing."""
    checkup = await check_store(store, spec, lambda done, total: None)
    assert checkup.findings == ()


async def collect_everything(store: RedisPrefixStore, redis: Redis) -> None:
    """Let the time of interrupted uploads be over; no byte may be left that no task keeps."""
    for name in await redis.zrange(layout.PENDING, 0, -1):
        await redis.zadd(layout.PENDING, {name: 0}, xx=True)
    await store.collect()
    blobs = await redis.hgetall(layout.BLOBS)
    used = {key for name in blobs.values() for key in Blob.named(name).keys}
    keys = [key async for key in redis.scan_iter("prefixserve:*", count=1000)]
    assert {key.decode() for key in keys if await redis.ttl(key) == -1} == used
    assert set(blobs) == {task.version.encode() for task in await store.list()}
    assert not await redis.exists(layout.PENDING, layout.GARBAGE)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_acknowledged_uploads_survive_kills_at_any_moment(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    acknowledged: set[int] = set()
    first = 0
    kills = dict.fromkeys(VICTIMS, 0)

    def check_all() -> None:
        expected = {f"t{number}": version_of(bytes_of(number)) for number in acknowledged}
        check(tmp_path, expected, {f"t{number}" for number in range(first)}, SPEC)

    for turn in range(KILLS):
        victim = chance.choice(VICTIMS)
        with working(tmp_path, first) as worker:
            # Sometimes while it starts; else anywhere in a stream of uploads.
            if chance.random() < 0.8:
                worker.wait_until_started()
            acknowledged.update(worker.acknowledged(chance.uniform(0, 0.15)))
            if worker.valkey is None:
                victim = "uploader"
            worker.kill(victim)
            acknowledged.update(worker.acknowledged(0))
        kills[victim] += 1
        first = max(first + 1, max(acknowledged, default=-1) + 2)  # one may have been on its way
        if turn % CHECK_EVERY == 0:
            check_all()
    check_all()
    assert sum(kills.values()) == KILLS
    assert min(kills.values()) > KILLS // 6
    assert len(acknowledged) > KILLS


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_acknowledged_uploads_survive_kills_of_the_server(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    chance = random.Random(SEED)
    config = AutoConfig.from_pretrained(tiny_llama_dir)
    spec = BaseModelSpec.from_model(AutoModelForCausalLM.from_config(config), "tiny")
    shape = (spec.num_layers, spec.num_kv_heads, 3, spec.head_dim)
    expected: dict[str, str] = {}
    attempted: set[str] = set()
    for victim in [*VICTIMS, *VICTIMS[::2]]:
        with running_server(tiny_llama_dir, tmp_path, "--no-demo-tasks") as server:
            process = psutil.Process(server.process.pid)
            victims = {"uploader": [process], "store": process.children()}
            victims["both"] = [*victims["store"], process]
            killing = threading.Timer(chance.uniform(0, 0.6), kill_all, [victims[victim]])
            killing.start()
            with httpx.Client(
                base_url=server.url, timeout=DEADLINE_SECONDS, headers=server.headers
            ) as client:
                upload_until_refused(client, shape, expected, attempted)
            killing.join()
            kill_all([*victims["both"]])
    check(store_dir(tmp_path), expected, attempted, spec)
    assert len(expected) > 5


def kill_all(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def upload_until_refused(
    client: httpx.Client,
    shape: tuple[int, int, int, int],
    expected: dict[str, str],
    attempted: set[str],
) -> None:
    """Upload until the server or its store is gone; note what was tried and what was answered."""
    for number in range(len(attempted), len(attempted) + 10_000):
        attempted.add(f"t{number}")
        artefact = a_prefix(number % 7, shape=shape).to_bytes()
        try:
            answer = client.put(f"/admin/tasks/t{number}", files={"file": ("p", artefact)})
        except httpx.TransportError:
            return
        if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE:
            return
        assert answer.status_code == httpx.codes.CREATED, answer.text
        expected[f"t{number}"] = version_of(artefact)
    raise AssertionError("it was never killed")
