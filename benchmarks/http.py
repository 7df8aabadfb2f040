"""The same sequences through the server: streaming clients over loopback, beside the engine alone.

    python -m benchmarks.http

The server is a process of its own, and so are the clients, which share its cores here: they stand
for clients on other machines and so do as little as clients can, a parser of HTTP in C that counts
the ends of events. Throughput counts from the moment the last client has its first token; latencies
are what a client sees.
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
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import httptools
import httpx
import uvloop

from benchmarks.common import (
    NEW_TOKENS,
    PREFIX_LENGTH,
    ROOT,
    alternate,
    arguments,
    load_model,
    prompt_texts,
    prompts,
    random_prefix,
    report,
)
from benchmarks.engine import MAX_LENGTH, MAX_SLOTS, decode_rate
from server.engine.choose_runner import choose_runner

SEQUENCES = 32
READY_SECONDS = 180


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """Where a server listens, its process id, and where it keeps everything."""

    url: str
    pid: int
    data_dir: Path


@contextmanager
def running_server(*flags: str, log: Path | None = None) -> Iterator[ServerProcess]:
    """A server process with the default model.

    Args:
        log: write its log there, a JSON object per line, and ask for keys; None does neither.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as data_dir:
        models = ROOT / ".cache" / "models"
        models.mkdir(parents=True, exist_ok=True)
        (Path(data_dir) / "models").symlink_to(models)
        command = [sys.executable, "-m", "clients", "serve", "--port", str(port)]
        command += ["--data-dir", data_dir, "--no-demo-tasks", *flags]
        if log is None:
            command += ["--no-auth", "--log-level", "warning"]
        else:
            command += ["--log-format", "json"]
        with nullcontext() if log is None else log.open("wb") as stderr:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)
        try:
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + READY_SECONDS
            while not _is_ready(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit("the server did not start")
                time.sleep(0.1)
            yield ServerProcess(url, process.pid, Path(data_dir))
        finally:
            process.terminate()
            process.wait()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready").is_success
    except httpx.TransportError:
        return False


@dataclass(frozen=True, slots=True)
class Streamed:
    """What the clients of one round saw.

    Attributes:
        times: of each stream, when each token came, in seconds since all were asked for.
        cpu_seconds: processor time of the clients' process.
    """

    times: list[list[float]]
    cpu_seconds: float


def stream_all(url: str, texts: list[str], new_tokens: int) -> Streamed:
    """Stream every text at once, each with its own task."""
    busy = time.process_time()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        times = runner.run(_stream_all(url, texts, new_tokens))
    if {len(own) for own in times} != {new_tokens}:
        raise SystemExit(f"expected {new_tokens} tokens of each stream, not {[*map(len, times)]}")
    return Streamed(times, time.process_time() - busy)


async def _stream_all(url: str, texts: list[str], new_tokens: int) -> list[list[float]]:
    loop, address = asyncio.get_running_loop(), httpx.URL(url)
    host, port = address.host, address.port or 80
    requests = [
        _request(f"{host}:{port}", f"task-{i}", text, new_tokens) for i, text in enumerate(texts)
    ]
    started = time.perf_counter()
    streams = await asyncio.gather(
        *(loop.create_connection(partial(_Stream, request), host, port) for request in requests)
    )
    times = await asyncio.gather(*(stream.times for _, stream in streams))
    return [[at - started for at in own] for own in times]


def _request(host: str, task_id: str, text: str, new_tokens: int) -> bytes:
    parameters = {"max_new_tokens": new_tokens, "ignore_eos": True}
    body = json.dumps({"inputs": text, "task_id": task_id, "parameters": parameters}).encode()
    head = (
        "POST /generate_stream HTTP/1.1\r\n"
        f"Host: {host}\r\n"
        "Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + body


class _Stream(asyncio.Protocol):
    """One request, and when each of its events ended."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._times: list[float] = []
        self._body_end = b""
        self._parser = httptools.HttpResponseParser(self)
        self.times: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast("asyncio.WriteTransport", transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        """Count the empty lines that end events, also where two reads part one."""
        body = self._body_end + body
        self._body_end = b"\n" if body.endswith(b"\n") and not body.endswith(b"\n\n") else b""
        self._times += [time.perf_counter()] * body.count(b"\n\n")

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() == HTTPStatus.OK:
            self.times.set_result(self._times)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.times.done():
            status = self._parser.get_status_code()
            self.times.set_exception(error or ConnectionError(f"no whole answer; status {status}"))


def http_rate(streams: list[list[float]]) -> float:
    """Tokens per second after every client has its first."""
    begin = max(times[0] for times in streams)
    end = max(times[-1] for times in streams)
    return sum(t > begin for times in streams for t in times) / (end - begin)


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p50, p95 and p99 in milliseconds."""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {f"p{p}_ms": 1000 * cuts[p - 1] for p in (50, 95, 99)}


def loop_seconds(pid: int) -> float:
    """Processor time of a process's first thread, on which the server's event loop runs (Linux)."""
    fields = Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def summary(rounds: list[Streamed], loop_cpu_seconds: float) -> dict[str, Any]:
    """Latencies and processor time of every round."""
    streams = [times for one in rounds for times in one.times]
    gaps = [b - a for times in streams for a, b in itertools.pairwise(times)]
    tokens = sum(map(len, streams))
    return {
        "ttft": percentiles([times[0] for times in streams]),
        "itl": percentiles(gaps),
        "cpu_us_per_token": {
            "server_event_loop": 1e6 * loop_cpu_seconds / tokens,
            "clients": 1e6 * sum(one.cpu_seconds for one in rounds) / tokens,
        },
    }


def main() -> None:
    """Run and report."""
    options = arguments(__doc__ or "").parse_args()
    size, new = (2, 4) if options.smoke else (SEQUENCES, NEW_TOKENS)
    loaded = load_model()
    runner = choose_runner(loaded, MAX_SLOTS, MAX_LENGTH)
    prompt_ids = prompts(loaded, size)
    texts = prompt_texts(size)
    prefixes = [random_prefix(loaded, PREFIX_LENGTH, seed) for seed in range(size)]
    rounds: list[Streamed] = []

    with (
        running_server() as server,
        ProcessPoolExecutor(1, mp_context=get_context("fork")) as clients,
    ):
        for i, prefix in enumerate(prefixes):
            answer = httpx.put(
                f"{server.url}/admin/tasks/task-{i}", files={"file": prefix.to_bytes()}, timeout=60
            )
            answer.raise_for_status()

        def over_http() -> float:
            rounds.append(clients.submit(stream_all, server.url, texts, new).result())
            return http_rate(rounds[-1].times)

        busy = loop_seconds(server.pid)
        rates = alternate(
            1 if options.smoke else options.rounds,
            {
                "engine": partial(decode_rate, runner, prompt_ids, list(prefixes), new),
                "http": over_http,
            },
        )
        busy = loop_seconds(server.pid) - busy
    results = {"tokens_per_second": rates, **summary(rounds, busy)}
    if not options.json:
        print(json.dumps(results, indent=2))
    ratio = rates["http"]["median"] / rates["engine"]["median"]
    report("http", results, {f"http_vs_engine_{size}": ratio})


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
