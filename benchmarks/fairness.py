"""What one tenant's flood does to another tenant's waiting.

    python -m benchmarks.fairness

One engine, as a server has it, on its thread. First its capacity is measured: requests a second
when there are always more than it has slots for. With two tenants, half of that is a share. The
guest asks for half of its share, at random times; the flood for 50 times its own, most of which is
refused.

The guest's queue time is what the engine tells with the first token: from `submit` to its slot. It
is taken alone and beside the flood, in turns, and once more with both under one name, which is
first come, first served. A request that comes in the middle of a step waits for the step's end at
least, and beside the flood every step is a full one: so the figure is the 99th percentile beside
the flood over twice that alone and one (99th percentile) step beside the flood; up to 1 the promise
is kept.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from benchmarks.common import arguments, load_model, prompts, report
from benchmarks.http import percentiles
from prefix_store.model_loading import LoadedModel
from server.engine.native import NativeEngine
from server.engine.protocol import (
    EngineConfig,
    GenerationRequest,
    QueueFullError,
    SamplingParams,
    StepStats,
)

FLOOD, GUEST = "flood", "guest"
FLOOD_SHARES, GUEST_SHARES = 50, 0.5


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure."""

    slots: int
    new_tokens: int
    seconds: float
    rounds: int


@dataclass(slots=True)
class Seen:
    """What became of one tenant's requests in the rounds of one kind.

    Attributes:
        queue, first: seconds to the slot and to the first token, of each that was answered.
        full: set once one was refused.
    """

    asked: int = 0
    refused: int = 0
    queue: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    full: asyncio.Event = field(default_factory=asyncio.Event)


class Steps:
    """The engine's steps in the rounds of each kind; `seen` is a `StepObserver`."""

    def __init__(self) -> None:
        self.kind = ""
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.preempted: Counter[str] = Counter()

    def seen(self, step: StepStats) -> None:
        """Keep one."""
        self.seconds[self.kind].append(step.seconds)
        self.preempted[self.kind] += step.preempted


class Clients:
    """Ask the engine, and count."""

    def __init__(self, engine: NativeEngine, prompt_ids: list[tuple[int, ...]], new: int) -> None:
        self._engine = engine
        self._prompts = prompt_ids
        self._sampling = SamplingParams(max_new_tokens=new, ignore_eos=True)
        self._numbers = count()

    async def ask(self, tenant: str, seen: Seen) -> None:
        """One request, to its end or until it is cancelled."""
        number = next(self._numbers)
        prompt = self._prompts[number % len(self._prompts)]
        request = GenerationRequest(str(number), prompt, self._sampling, tenant=tenant)
        seen.asked += 1
        started = time.perf_counter()
        try:
            stream = self._engine.submit(request)
        except QueueFullError:
            seen.refused += 1
            seen.full.set()
            return
        try:
            async for event in stream:
                if event.queue_seconds is not None:
                    seen.queue.append(event.queue_seconds)
                    seen.first.append(time.perf_counter() - started)
        finally:
            await stream.aclose()

    @asynccontextmanager
    async def asking(
        self, tenant: str, seen: Seen, rate: float, rng: random.Random
    ) -> AsyncIterator[None]:
        """Ask at random times, `rate` a second on average, whatever becomes of it."""
        running: set[asyncio.Task[None]] = set()

        async def ask_on() -> None:
            at = time.perf_counter()
            while True:
                task = asyncio.create_task(self.ask(tenant, seen))
                running.add(task)
                task.add_done_callback(running.discard)
                at += rng.expovariate(rate)
                await asyncio.sleep(at - time.perf_counter())

        asking = asyncio.create_task(ask_on())
        try:
            yield
        finally:
            for task in (ended := [asking, *running]):
                task.cancel()
            await asyncio.gather(*ended, return_exceptions=True)

    async def capacity(self, requests: int) -> float:
        """Requests a second while there are more than fit."""
        started = time.perf_counter()
        await asyncio.gather(*(self.ask(GUEST, Seen()) for _ in range(requests)))
        return requests / (time.perf_counter() - started)


class Rounds:
    """Rounds of the guest alone and beside the flood, on one engine."""

    def __init__(self, clients: Clients, steps: Steps, share: float, seconds: float) -> None:
        self._clients = clients
        self._steps = steps
        self._share = share
        self._seconds = seconds
        self._rng = random.Random(0)  # noqa: S311 - not for secrets
        self.guest: dict[str, Seen] = defaultdict(Seen)
        self.flood: dict[str, Seen] = defaultdict(Seen)

    async def run(self, kind: str, flood: str | None = None) -> None:
        """One round; where there is a flood, the guest begins when it is as high as it gets."""
        if flood is None:
            await self._ask(kind)
            return
        seen = self.flood[kind]
        seen.full.clear()
        async with self._clients.asking(flood, seen, FLOOD_SHARES * self._share, self._rng):
            await seen.full.wait()
            await self._ask(kind)

    async def _ask(self, kind: str) -> None:
        rate = GUEST_SHARES * self._share
        async with self._clients.asking(GUEST, self.guest[kind], rate, self._rng):
            self._steps.kind = kind
            await asyncio.sleep(self._seconds)
            self._steps.kind = ""

    def summary(self) -> dict[str, Any]:
        """Every figure of every kind."""
        return {kind: self._summary(kind) for kind in self.guest}

    def _summary(self, kind: str) -> dict[str, Any]:
        guest, flood = self.guest[kind], self.flood.get(kind)
        found: dict[str, Any] = {
            "asked": guest.asked,
            "answered": len(guest.queue) / max(1, guest.asked),
            "step": percentiles(self._steps.seconds[kind]),
            "preempted": self._steps.preempted[kind],
        }
        if guest.queue:  # twice, for a smoke run that has one
            found |= {"queue": percentiles(2 * guest.queue), "ttft": percentiles(2 * guest.first)}
        if flood is not None:
            found["flood"] = {"asked": flood.asked, "refused": flood.refused / flood.asked}
        return found


async def measure(loaded: LoadedModel, plan: Plan) -> dict[str, Any]:
    """Every figure."""
    steps = Steps()
    config = EngineConfig(max_slots=plan.slots, max_length=256, max_waiting=8 * plan.slots)
    engine = NativeEngine(loaded, config, steps.seen)
    try:
        clients = Clients(engine, prompts(loaded, 64), plan.new_tokens)
        await clients.capacity(plan.slots)
        capacity = await clients.capacity(3 * plan.slots)
        rounds = Rounds(clients, steps, capacity / 2, plan.seconds)
        for _ in range(plan.rounds):
            await rounds.run("alone")
            await rounds.run("beside_flood", FLOOD)
        await rounds.run("one_name", GUEST)
    finally:
        await engine.close()
    return {"requests_per_second": capacity, "guest": rounds.summary()}


def main() -> None:
    """Run and report."""
    options = arguments(__doc__ or "").parse_args()
    plan = Plan(64, 16, 60, options.rounds)
    if options.smoke:
        plan = Plan(4, 2, 2, 1)
    results = asyncio.run(measure(load_model(), plan))
    if not options.json:
        print(json.dumps(results, indent=2))
    alone, beside = results["guest"]["alone"], results["guest"]["beside_flood"]
    queue, step = beside["queue"]["p99_ms"], beside["step"]["p99_ms"]
    ratios = {
        "fairness_queue_p99": queue / (2 * alone["queue"]["p99_ms"] + step),
        "fairness_queue_p99_vs_alone": queue / alone["queue"]["p99_ms"],
    }
    report("fairness", results, ratios)


if __name__ == "__main__":
    main()
