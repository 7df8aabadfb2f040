"""What a prefix costs that is only in the store: its own request, and those that run meanwhile.

    python -m benchmarks.cold

Added time to first token: requests one at a time, each for a task that was never asked for, and
then again for the same task. The figure is the difference of the two, request by request.

Inter-token latency: sequences that stream, while short requests come at a steady pace: none, for
tasks that are loaded, or each for a cold one. Server and clients are processes of their own.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from multiprocessing import get_context
from typing import Any

import httpx

from benchmarks.common import (
    PREFIX_LENGTH,
    arguments,
    load_model,
    prompt_texts,
    random_prefix,
    report,
)
from benchmarks.http import percentiles
from benchmarks.many_tasks import task_name, task_server
from prefix_store.prefix import Prefix

RUNNING = 16
LOADS = 100
PAIRS = 300
SPACING_SECONDS = 0.04
NEVER_ENDS = 1500
WARM_UP = 3


def _body(task: int, text: str, new_tokens: int) -> dict[str, Any]:
    return {
        "inputs": text,
        "task_id": task_name(task),
        "parameters": {"max_new_tokens": new_tokens},
    }


def first_tokens(url: str, text: str, tasks: list[int]) -> tuple[list[float], list[float]]:
    """Seconds to the first token of each task's first request, and of its second."""
    with httpx.Client(base_url=url, timeout=60) as client:

        def once(task: int) -> float:
            started = time.perf_counter()
            body = _body(task, text, 2)
            with client.stream("POST", "/generate_stream", json=body) as response:
                response.raise_for_status()
                lines = response.iter_lines()
                next(lines)
                seconds = time.perf_counter() - started
                for _ in lines:
                    pass
            return seconds

        pairs = [(once(task), once(task)) for task in tasks]
    return [cold for cold, _ in pairs], [warm for _, warm in pairs]


def gaps_while(url: str, texts: list[str], visits: list[int | None]) -> list[float]:
    """Stream each text with its own task; the gaps between tokens while `visits` are made.

    A visit is a request of one token for that task, or, to pass the time, nothing.
    """
    return asyncio.run(_gaps_while(url, texts, visits))


async def _gaps_while(url: str, texts: list[str], visits: list[int | None]) -> list[float]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
        streams = [_Stream(client, task, text) for task, text in enumerate(texts)]
        await asyncio.gather(*(stream.started.wait() for stream in streams))
        begin = time.perf_counter()
        await _visit(client, visits)
        end = time.perf_counter()
        for stream in streams:
            await stream.stop()
    return [
        after - before
        for stream in streams
        for before, after in pairwise(stream.times)
        if begin <= after <= end
    ]


async def _visit(client: httpx.AsyncClient, visits: list[int | None]) -> None:
    """One request after the other begins, at a steady pace, whenever the others end."""
    begin = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number, task in enumerate(visits):
            await asyncio.sleep(max(0.0, begin + number * SPACING_SECONDS - time.perf_counter()))
            if task is not None:
                group.create_task(_ask(client, _body(task, "Hello", 1)))


async def _ask(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    (await client.post("/generate", json=body)).raise_for_status()


class _Stream:
    """One sequence that streams until it is told to stop."""

    def __init__(self, client: httpx.AsyncClient, task: int, text: str) -> None:
        self.times: list[float] = []
        self.started = asyncio.Event()
        self._task = asyncio.create_task(self._run(client, _body(task, text, NEVER_ENDS)))

    async def _run(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        async with client.stream("POST", "/generate_stream", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data:"):
                    self.times.append(time.perf_counter())
                    if len(self.times) > WARM_UP:
                        self.started.set()

    async def stop(self) -> None:
        if self._task.done():
            raise SystemExit("a stream ended before the visits did")
        self._task.cancel()
        await asyncio.wait([self._task])


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure.

    Attributes:
        running: sequences that stream.
        loads: requests in a round of each kind.
        pairs: cold requests whose time to first token is taken.
    """

    running: int
    loads: int
    pairs: int
    rounds: int

    @property
    def tasks(self) -> int:
        """All that must be registered; one round is for warming up."""
        return self.running + WARM_UP + self.pairs + (self.rounds + 1) * self.loads


async def measure(texts: list[str], prefix: Prefix, plan: Plan) -> dict[str, Any]:
    """Every figure."""
    fresh = iter(range(plan.running, plan.tasks))
    async with task_server() as server:
        await server.register(prefix, range(plan.tasks))
        with ProcessPoolExecutor(1, mp_context=get_context("fork")) as clients:
            asked = [*islice(fresh, WARM_UP + plan.pairs)]
            cold, warm = clients.submit(first_tokens, server.url, texts[0], asked).result()
            gaps: dict[str, list[float]] = {"idle": [], "warm": [], "cold": []}
            for number in range(plan.rounds + 1):
                kinds: dict[str, list[int | None]] = {
                    "idle": [None] * plan.loads,
                    "warm": [*islice(cycle(asked), plan.loads)],
                    "cold": [*islice(fresh, plan.loads)],
                }
                for kind, visits in kinds.items():
                    found = clients.submit(gaps_while, server.url, texts, visits).result()
                    if number:  # the first round warms up
                        gaps[kind] += found
        loads = server.metric("prefix_load_seconds_count", tier="device")
        seconds = server.metric("prefix_load_seconds_sum", tier="device")
    if loads != plan.tasks:
        raise SystemExit(f"{loads:.0f} prefixes were loaded; expected {plan.tasks}")
    added = [a - b for a, b in zip(cold, warm, strict=True)][WARM_UP:]
    return {
        "ttft": {
            "cold": percentiles(cold[WARM_UP:]),
            "warm": percentiles(warm[WARM_UP:]),
            "added": percentiles(added),
        },
        "itl": {kind: percentiles(found) for kind, found in gaps.items()},
        "load_mean_ms": 1000 * seconds / loads,
    }


def main() -> None:
    """Run and report."""
    options = arguments(__doc__ or "").parse_args()
    plan = Plan(2, 4, 4, 1) if options.smoke else Plan(RUNNING, LOADS, PAIRS, options.rounds)
    loaded = load_model()
    texts = prompt_texts(plan.running)
    prefix = random_prefix(loaded, PREFIX_LENGTH, seed=0)
    results = asyncio.run(measure(texts, prefix, plan))
    if not options.json:
        print(json.dumps(results, indent=2))
    itl = {kind: found["p99_ms"] for kind, found in results["itl"].items()}
    ratios = {
        "cold_ttft_added_p99_ms": results["ttft"]["added"]["p99_ms"],
        "cold_itl_ratio_p99": itl["cold"] / itl["idle"],
        "cold_vs_warm_itl_p99": itl["cold"] / itl["warm"],
    }
    report("cold", results, ratios)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
