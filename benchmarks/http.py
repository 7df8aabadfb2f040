"""The same sequences through the server: streaming clients over loopback, beside the engine alone.

    python -m benchmarks.http

The server is a process of its own, and so are the clients. Throughput counts from the moment the
last client has its first token; latencies are what a client sees.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import httpx

from benchmarks.common import (
    NEW_TOKENS,
    PREFIX_LENGTH,
    ROOT,
    alternate,
    arguments,
    load_model,
    prompts,
    random_prefix,
    report,
)
from benchmarks.engine import MAX_LENGTH, MAX_SLOTS, decode_rate
from server.engine.native import choose_runner

SEQUENCES = 32
READY_SECONDS = 60


@contextmanager
def running_server(*flags: str) -> Iterator[str]:
    """A server process with the default model; its address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as data_dir:
        (Path(data_dir) / "models").symlink_to(ROOT / ".cache" / "models")
        command = [sys.executable, "-m", "clients", "serve", "--port", str(port)]
        command += ["--data-dir", data_dir, "--no-demo-tasks", "--log-level", "warning", *flags]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + READY_SECONDS
            while not _is_ready(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit("the server did not start")
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()
            process.wait()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready").is_success
    except httpx.TransportError:
        return False


def stream_all(url: str, texts: list[str], new_tokens: int) -> list[list[float]]:
    """Stream every text at once, each with its own task; when each token came, in seconds."""
    return asyncio.run(_stream_all(url, texts, new_tokens))


async def _stream_all(url: str, texts: list[str], new_tokens: int) -> list[list[float]]:
    limits = httpx.Limits(max_connections=len(texts))
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        started = time.perf_counter()
        streams = [
            _stream(client, f"task-{i}", text, new_tokens, started) for i, text in enumerate(texts)
        ]
        return await asyncio.gather(*streams)


async def _stream(
    client: httpx.AsyncClient, task_id: str, text: str, new_tokens: int, started: float
) -> list[float]:
    body = {"inputs": text, "task_id": task_id, "parameters": {"max_new_tokens": new_tokens}}
    times = []
    async with client.stream("POST", "/generate_stream", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data:"):
                times.append(time.perf_counter() - started)
    return times


def http_rate(streams: list[list[float]]) -> float:
    """Tokens per second after every client has its first."""
    begin = max(times[0] for times in streams)
    end = max(times[-1] for times in streams)
    return sum(t > begin for times in streams for t in times) / (end - begin)


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p50, p95 and p99 in milliseconds."""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {f"p{p}_ms": 1000 * cuts[p - 1] for p in (50, 95, 99)}


def main() -> None:
    """Run and report."""
    options = arguments(__doc__ or "").parse_args()
    size, new = (2, 4) if options.smoke else (SEQUENCES, NEW_TOKENS)
    rounds = 1 if options.smoke else options.rounds
    loaded = load_model()
    runner = choose_runner(loaded, MAX_SLOTS, MAX_LENGTH)
    prompt_ids = prompts(loaded, size)
    texts = [loaded.tokenizer.decode(ids) for ids in prompt_ids]
    prefixes = [random_prefix(loaded, PREFIX_LENGTH, seed) for seed in range(size)]
    everything: list[list[float]] = []

    with (
        running_server() as url,
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as clients,
    ):
        for i, prefix in enumerate(prefixes):
            answer = httpx.put(
                f"{url}/admin/tasks/task-{i}", files={"file": prefix.to_bytes()}, timeout=60
            )
            answer.raise_for_status()

        def over_http() -> float:
            streams = clients.submit(stream_all, url, texts, new).result()
            everything.extend(streams)
            return http_rate(streams)

        rates = alternate(
            rounds,
            {
                "engine": partial(decode_rate, runner, prompt_ids, list(prefixes), new),
                "http": over_http,
            },
        )
    gaps = [b - a for times in everything for a, b in itertools.pairwise(times)]
    results = {
        "tokens_per_second": rates,
        "ttft": percentiles([times[0] for times in everything]),
        "itl": percentiles(gaps),
    }
    if not options.json:
        print(json.dumps(results, indent=2))
    ratio = rates["http"]["median"] / rates["engine"]["median"]
    report("http", results, {f"http_vs_engine_{size}": ratio})


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
