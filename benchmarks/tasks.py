"""How throughput and memory depend on the number of tasks.

    python -m benchmarks.tasks

A server on a store with 1, then 100, 1,000 and 10,000 tasks; memory is taken at each. Then clients
that always wait for an answer and ask again, each time for a task drawn uniformly or by Zipf's law
(s = 1) from the first 1, 100, 1,000 or 10,000: these take turns. The cache has room for 182
prefixes, so that most of 10,000 tasks come from the store when they are asked for. Memory is
compared with what `prefixserve plan` computes.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import httpx

from benchmarks.common import (
    PREFIX_LENGTH,
    ROOT,
    alternate,
    arguments,
    load_model,
    prompt_texts,
    random_prefix,
    report,
)
from benchmarks.many_tasks import TaskServer, task_name, task_server
from clients.planning.model_size import model_size
from clients.planning.plan import TASK_BYTES, Machine, replica_memory
from prefix_store.model_loading import DEFAULT_MODEL, LoadedModel
from prefix_store.prefix import Prefix

CLIENTS = 32
REQUESTS = 4
NEW_TOKENS = 32
CACHE_BYTES = 64 * 2**20


def rate(url: str, texts: list[str], drawn: list[list[int]], new_tokens: int) -> float:
    """Tokens per second of one client per text, each asking for its drawn tasks in turn."""
    return asyncio.run(_rate(url, texts, drawn, new_tokens))


async def _rate(url: str, texts: list[str], drawn: list[list[int]], new_tokens: int) -> float:
    limits = httpx.Limits(max_connections=len(texts))
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def ask(text: str, tasks: list[int]) -> int:
            tokens = 0
            for task in tasks:
                body = {
                    "inputs": text,
                    "task_id": task_name(task),
                    "parameters": {"max_new_tokens": new_tokens, "details": True},
                }
                answer = await client.post("/generate", json=body)
                answer.raise_for_status()
                tokens += answer.json()["details"]["generated_tokens"]
            return tokens

        started = time.perf_counter()
        tokens = await asyncio.gather(*map(ask, texts, drawn))
        return sum(tokens) / (time.perf_counter() - started)


class Load:
    """Draws tasks, has clients ask for them, and keeps the server's largest figures."""

    def __init__(
        self, server: TaskServer, clients: ProcessPoolExecutor, texts: list[str], new_tokens: int
    ) -> None:
        self._server = server
        self._clients = clients
        self._texts = texts
        self._new_tokens = new_tokens
        self._draw = random.Random(0)  # noqa: S311 - not for secrets
        self.most_cached_bytes = 0.0
        self.most_resident_bytes = 0.0

    def rate(self, weights: list[float]) -> float:
        """Tokens per second with tasks drawn by these weights."""
        drawn = [self._draw.choices(range(len(weights)), weights, k=REQUESTS) for _ in self._texts]
        job = self._clients.submit(rate, self._server.url, self._texts, drawn, self._new_tokens)
        found = job.result()
        cached = self._server.metric("prefix_cache_bytes", tier="device")
        resident = self._server.metric("process_resident_memory_bytes")
        self.most_cached_bytes = max(self.most_cached_bytes, cached)
        self.most_resident_bytes = max(self.most_resident_bytes, resident)
        return found


async def measure(
    texts: list[str], prefix: Prefix, counts: list[int], new_tokens: int, rounds: int
) -> dict[str, Any]:
    """Every figure."""
    registered, memory = 0, {}
    async with task_server("--prefix-cache-bytes", str(CACHE_BYTES)) as server:
        with ProcessPoolExecutor(1, mp_context=get_context("fork")) as clients:
            load = Load(server, clients, texts, new_tokens)
            for count in counts:
                await server.register(prefix, range(registered, count))
                registered = count
                load.rate([1.0])
                memory[str(count)] = {
                    "server_bytes": server.metric("process_resident_memory_bytes"),
                    "store_bytes": await server.store_bytes(),
                }
            measures = {"1": partial(load.rate, [1.0])}
            for count in counts[1:]:
                zipf = [1 / rank for rank in range(1, count + 1)]
                measures[f"{count}_zipf"] = partial(load.rate, zipf)
                measures[f"{count}_uniform"] = partial(load.rate, [1.0] * count)
            rates = alternate(rounds, measures)
        hits = server.metric("prefix_cache_hits_total", tier="device")
        misses = server.metric("prefix_cache_misses_total", tier="device")
        evictions = server.metric("prefix_cache_evictions_total", tier="device")
    return {
        "tokens_per_second": rates,
        "memory_when_registered": memory,
        "cache": {"hits": hits, "misses": misses, "evictions": evictions},
        "prefix_bytes": prefix.nbytes,
        "cache_budget_bytes": CACHE_BYTES,
        "cache_most_bytes": load.most_cached_bytes,
        "server_most_bytes": load.most_resident_bytes,
    }


def planned_vs_measured(
    results: dict[str, Any], loaded: LoadedModel, sequences: int, positions: int
) -> dict[str, float]:
    """What `prefixserve plan` computes of the memory, as shares of what was measured.

    Args:
        sequences, positions: what was in use at once; on a CPU the rest of the slots' memory stays
            with the operating system.
    """
    size = model_size(DEFAULT_MODEL, dtype=loaded.model.dtype, cache_dir=ROOT / ".cache" / "models")
    memory = replica_memory(size, Machine("cpu", 0, sequences, positions))
    server = memory.runtime + memory.weights + memory.slots + results["cache_most_bytes"]
    registered = results["memory_when_registered"]
    few, many = min(registered, key=int), max(registered, key=int)
    store = registered[many]["store_bytes"] - registered[few]["store_bytes"]
    tasks = int(many) - int(few)
    return {
        "planned_vs_measured_server": server / results["server_most_bytes"],
        "planned_vs_measured_store": tasks * (results["prefix_bytes"] + TASK_BYTES) / store,
    }


def main() -> None:
    """Run and report."""
    options = arguments(__doc__ or "").parse_args()
    counts = [1, 4] if options.smoke else [1, 100, 1_000, 10_000]
    clients, new_tokens = (2, 2) if options.smoke else (CLIENTS, NEW_TOKENS)
    rounds = 1 if options.smoke else options.rounds
    loaded = load_model()
    texts = prompt_texts(clients)
    prefix = random_prefix(loaded, PREFIX_LENGTH, seed=0)
    results = asyncio.run(measure(texts, prefix, counts, new_tokens, rounds))
    if not options.json:
        print(json.dumps(results, indent=2))
    if results["cache_most_bytes"] > CACHE_BYTES:
        raise SystemExit("the cache was over its budget")
    medians = {name: found["median"] for name, found in results["tokens_per_second"].items()}
    most = counts[-1]
    ratios = {f"tasks_{most}_vs_1": medians[f"{most}_zipf"] / medians["1"]}
    ratios[f"tasks_{most}_uniform_vs_1"] = medians[f"{most}_uniform"] / medians["1"]
    longest = max(len(loaded.tokenizer(text)["input_ids"]) for text in texts) + new_tokens
    planned = planned_vs_measured(results, loaded, clients, longest)
    if not all(0.9 <= found <= 1.1 for found in planned.values()):
        raise SystemExit(f"the plan is more than a tenth off what was measured: {planned}")
    ratios |= planned
    report("tasks", results, ratios)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
