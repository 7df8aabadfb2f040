"""What one tenant's flood does to another tenant's waiting, on a server.

    python -m benchmarks.fairness

A server process with two tenants and a key for each. First its capacity is measured: sequences a
second when there are always more than it has slots for. With two tenants, half of that is a share.
The guest asks for half of its share at random times, a sequence a request; the flood for 50 times
its own, most of which is refused, many sequences a request so that it takes the server's time for
sequences and not for HTTP.

The guest's queue time is the server's own, of each request's line in its log: until it has a slot.
It is taken alone and beside the flood, in turns, and once more with both under one key, which is
first come, first served. The figure is the 99th percentile beside the flood over that alone.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.common import arguments, prompt_texts, report
from benchmarks.http import ServerProcess, percentiles, running_server

FLOOD, GUEST = "flood", "guest"
FLOOD_SHARES, GUEST_SHARES = 50, 0.5
FLOOD_INPUTS = 32
ALONE, BESIDE, ONE_KEY = "alone", "beside_flood", "one_key"


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure.

    Attributes:
        slots, waiting: how many sequences the server runs, and lets wait.
        capacity_calls: of the flood, to measure the capacity with.
        seconds, patience: of a round, and to wait at its end for what is not answered yet.
    """

    slots: int
    waiting: int
    new_tokens: int
    capacity_calls: int
    seconds: float
    patience: float
    rounds: int


@dataclass(frozen=True, slots=True)
class Load:
    """What one tenant asks for.

    Attributes:
        rate: sequences a second, on average.
        key: whose key it asks with.
        inputs: sequences of each request.
        patience: seconds to wait at the end for what is not answered yet.
    """

    tenant: str
    rate: float
    key: str
    inputs: int = 1
    patience: float = 0.0


@dataclass(slots=True)
class Seen:
    """What became of one tenant's sequences in the rounds of one kind.

    Attributes:
        full: set once some were refused.
    """

    asked: int = 0
    refused: int = 0
    full: asyncio.Event = field(default_factory=asyncio.Event)


class Clients:
    """Ask the server; each request's id begins with the kind of its round and its tenant."""

    def __init__(self, http: httpx.AsyncClient, keys: dict[str, str], new_tokens: int) -> None:
        self._http = http
        self._keys = keys
        self._new_tokens = new_tokens
        self._texts = itertools.cycle(prompt_texts(64))
        self._numbers = itertools.count()
        self._rng = random.Random(0)  # noqa: S311 - not for secrets

    async def ask(self, kind: str, load: Load, seen: Seen) -> None:
        """One request, to its end or until it is cancelled."""
        seen.asked += load.inputs
        answer = await self._http.post(
            "/generate",
            json={
                "inputs": [next(self._texts) for _ in range(load.inputs)],
                "parameters": {"max_new_tokens": self._new_tokens, "ignore_eos": True},
            },
            headers={
                "Authorization": f"Bearer {self._keys[load.key]}",
                "X-Request-Id": f"{kind}:{load.tenant}:{next(self._numbers)}",
            },
        )
        if answer.status_code == HTTPStatus.TOO_MANY_REQUESTS:
            seen.refused += load.inputs
            seen.full.set()
        else:
            answer.raise_for_status()

    @asynccontextmanager
    async def asking(self, kind: str, load: Load, seen: Seen) -> AsyncIterator[None]:
        """Ask at random times, whatever becomes of it."""
        running: set[asyncio.Task[None]] = set()

        async def ask_on() -> None:
            at = time.perf_counter()
            while True:
                task = asyncio.create_task(self.ask(kind, load, seen))
                running.add(task)
                task.add_done_callback(running.discard)
                at += self._rng.expovariate(load.rate / load.inputs)
                await asyncio.sleep(at - time.perf_counter())

        asking = asyncio.create_task(ask_on())
        try:
            yield
        finally:
            asking.cancel()
            if running:
                await asyncio.wait(running, timeout=load.patience)
            for task in (ended := [asking, *running]):
                task.cancel()
            await asyncio.gather(*ended, return_exceptions=True)

    async def capacity(self, calls: int) -> float:
        """Sequences a second while there are more than fit."""
        started = time.perf_counter()
        load = Load(FLOOD, 0, FLOOD, FLOOD_INPUTS)
        await asyncio.gather(*(self.ask("capacity", load, Seen()) for _ in range(calls)))
        return calls * FLOOD_INPUTS / (time.perf_counter() - started)

    async def metrics(self) -> dict[str, float]:
        """The server's own, added up over labels."""
        headers = {"Authorization": f"Bearer {self._keys['default']}"}
        answer = await self._http.get("/metrics", headers=headers)
        found: dict[str, float] = defaultdict(float)
        for family in text_string_to_metric_families(answer.raise_for_status().text):
            for one in family.samples:
                found[one.name.removeprefix("prefixserve_")] += one.value
        return found

    async def idle(self) -> None:
        """Return when nothing waits or runs."""
        now = await self.metrics()
        while now["running_requests"] or now["waiting_requests"]:
            await asyncio.sleep(0.05)
            now = await self.metrics()


class Rounds:
    """Rounds of the guest alone and beside the flood, on one server."""

    def __init__(self, clients: Clients, share: float, plan: Plan) -> None:
        self._clients = clients
        self._share = share
        self._plan = plan
        self._guest: dict[str, Seen] = defaultdict(Seen)
        self._flood: dict[str, Seen] = defaultdict(Seen)
        self._steps: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])

    async def run(self, kind: str) -> None:
        """One round; where there is a flood, the guest begins when it is as high as it gets."""
        await self._clients.idle()
        if kind == ALONE:
            await self._ask(kind)
            return
        seen = self._flood[kind]
        seen.full.clear()
        load = Load(FLOOD, FLOOD_SHARES * self._share, FLOOD, FLOOD_INPUTS)
        async with self._clients.asking(kind, load, seen):
            await seen.full.wait()
            await self._ask(kind, key=FLOOD if kind == ONE_KEY else GUEST)

    async def _ask(self, kind: str, key: str = GUEST) -> None:
        load = Load(GUEST, GUEST_SHARES * self._share, key, patience=self._plan.patience)
        names = ("step_seconds_sum", "step_seconds_count", "preempted_total")
        before = await self._clients.metrics()
        async with self._clients.asking(kind, load, self._guest[kind]):
            await asyncio.sleep(self._plan.seconds)
        after = await self._clients.metrics()
        added = [after[name] - before[name] for name in names]
        self._steps[kind] = [a + b for a, b in zip(self._steps[kind], added, strict=True)]

    def summary(self, log: Path) -> dict[str, Any]:
        """Every figure of every kind."""
        waited = _queue_seconds(log)
        return {kind: self._summary(kind, waited[f"{kind}:{GUEST}"]) for kind in self._guest}

    def _summary(self, kind: str, waited: list[float]) -> dict[str, Any]:
        guest, flood = self._guest[kind], self._flood.get(kind)
        seconds, steps, preempted = self._steps[kind]
        found: dict[str, Any] = {
            "asked": guest.asked,
            "answered": len(waited) / max(1, guest.asked),
            "step_mean_ms": 1000 * seconds / max(1.0, steps),
            "preempted": int(preempted),
        }
        if waited:  # twice, for a smoke run that has one
            found["queue"] = percentiles(2 * waited)
        if flood is not None:
            found["flood"] = {"asked": flood.asked, "refused": flood.refused / flood.asked}
        return found


def _queue_seconds(log: Path) -> dict[str, list[float]]:
    """Of the answered requests in a server's log, by the beginning of their ids."""
    found: dict[str, list[float]] = defaultdict(list)
    for line in log.read_text(encoding="utf-8").splitlines():
        told = json.loads(line)
        if told.get("status") == HTTPStatus.OK and "queue_seconds" in told:
            found[told["request_id"].rpartition(":")[0]].append(told["queue_seconds"])
    return found


async def _keys(http: httpx.AsyncClient, server: ServerProcess) -> dict[str, str]:
    """A key of each tenant."""
    keys = {"default": (server.data_dir / "admin.key").read_text().strip()}
    for tenant in (FLOOD, GUEST):
        answer = await http.post(
            "/admin/keys",
            json={"tenant": tenant, "scopes": ["generate"]},
            headers={"Authorization": f"Bearer {keys['default']}"},
        )
        keys[tenant] = answer.raise_for_status().json()["key"]
    return keys


async def measure(server: ServerProcess, log: Path, plan: Plan) -> dict[str, Any]:
    """Every figure."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as http:
        clients = Clients(http, await _keys(http, server), plan.new_tokens)
        await clients.capacity(1)
        capacity = await clients.capacity(plan.capacity_calls)
        rounds = Rounds(clients, capacity / 2, plan)
        for _ in range(plan.rounds):
            await rounds.run(ALONE)
            await rounds.run(BESIDE)
        await rounds.run(ONE_KEY)
    return {"sequences_per_second": capacity, "guest": rounds.summary(log)}


def main() -> None:
    """Run and report."""
    options = arguments(__doc__ or "").parse_args()
    plan = Plan(64, 512, 16, capacity_calls=6, seconds=20, patience=5, rounds=options.rounds)
    if options.smoke:
        plan = Plan(4, 64, 1, capacity_calls=1, seconds=1, patience=2, rounds=1)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        flags = ["--max-slots", str(plan.slots), "--max-waiting", str(plan.waiting)]
        flags += ["--max-length", "256"]
        with running_server(*flags, log=log) as server:
            results = asyncio.run(measure(server, log, plan))
    if not options.json:
        print(json.dumps(results, indent=2))
    alone, beside = (results["guest"][kind]["queue"]["p99_ms"] for kind in (ALONE, BESIDE))
    report("fairness", results, {"fairness_queue_p99": beside / alone})


if __name__ == "__main__":
    main()
