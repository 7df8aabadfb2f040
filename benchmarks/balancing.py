"""Where a task's requests go: the prefix cache's hit rate with tasks hashed to replicas, or not.

    python -m benchmarks.balancing

Two servers on one store, behind nginx as `deploy/nginx` has it, hashing by the header that the
client sends, and the same without the hash, which is round robin. Clients ask for one token each,
of tasks drawn uniformly and by Zipf's law (s = 1) from 1,000; a server has room for 100 prefixes.
Hit rates are those of `/metrics`, beside what `prefixserve plan` expects of such a cache. Needs
nginx: apt-get install nginx.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.common import PREFIX_LENGTH, ROOT, arguments, load_model, random_prefix, report
from benchmarks.http import running_server
from benchmarks.many_tasks import TaskServer, task_name, task_server
from clients import AsyncClient
from clients.planning import lru_hit_rate, zipf
from prefix_store.prefix import Prefix

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
TASKS = 1_000
ROOM = 100
REQUESTS = 3_000
CLIENTS = 16
_READY_SECONDS = 10


@contextmanager
def balancer(folder: Path, servers: Sequence[str], *, hashed: bool = True) -> Iterator[str]:
    """nginx with `deploy/nginx` in front of servers; its address.

    Args:
        folder: empty, for its files; its log of requests is `access.log` there.
        hashed: false for round robin.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    _configure(folder, servers, port, hashed)
    command = [str(NGINX), "-p", str(folder), "-c", str(folder / "nginx.conf")]
    user = "user root; " if os.geteuid() == 0 else ""
    command += ["-g", f"daemon off; {user}pid {folder / 'pid'};"]
    with (folder / "error.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait(process, port, folder / "error.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _configure(folder: Path, servers: Sequence[str], port: int, hashed: bool) -> None:
    """Put the files of `deploy/nginx` into `folder`, with these servers and this port."""
    lines = [f"server {urlsplit(server).netloc} max_fails=0;\n" for server in servers]
    (folder / "servers.conf").write_text("".join(lines))
    (folder / "batches.conf").write_text(lines[0])
    places = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    changes = {
        "http {\n": "http {\n" + "".join(f"{name}_temp_path {folder / name};\n" for name in places),
        "listen 8080;": f"listen 127.0.0.1:{port};",
        "access_log /dev/stdout replica;": f"access_log {folder / 'access.log'} replica;",
    }
    if not hashed:
        changes["hash $balanced_by consistent;"] = ""
    text = (ROOT / "deploy" / "nginx" / "nginx.conf").read_text()
    for old, new in changes.items():
        if text.count(old) != 1:
            raise SystemExit(f"expected {old!r} once in deploy/nginx/nginx.conf")
        text = text.replace(old, new)
    (folder / "nginx.conf").write_text(text)


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"nginx did not start: {log.read_text()}") from None
            time.sleep(0.02)
        else:
            return


async def ask(url: str, tasks: Sequence[str], clients: int, api_key: str | None = None) -> None:
    """One token of each task, so many requests at a time."""
    waiting = iter(tasks)
    async with AsyncClient(url, api_key=api_key) as client:

        async def work() -> None:
            for task in waiting:
                await client.generate("Hello", task_id=task, max_new_tokens=1)

        await asyncio.gather(*(work() for _ in range(clients)))


class Replicas:
    """Servers on one store, and their hits and misses together."""

    def __init__(self, servers: Sequence[TaskServer]) -> None:
        self._servers = servers

    @property
    def urls(self) -> list[str]:
        """Where they listen."""
        return [server.url for server in self._servers]

    def counts(self) -> tuple[float, float]:
        """Hits and misses so far."""
        names = ("prefix_cache_hits_total", "prefix_cache_misses_total")
        hits, misses = (
            sum(server.metric(name, tier="device") for server in self._servers) for name in names
        )
        return hits, misses

    async def hit_rate(self, drawn: Sequence[str], clients: int, *, hashed: bool) -> float:
        """Of the second half of these requests; the first fills the caches."""
        half = len(drawn) // 2
        with (
            tempfile.TemporaryDirectory() as folder,
            balancer(Path(folder), self.urls, hashed=hashed) as url,
        ):
            await ask(url, drawn[:half], clients)
            before = self.counts()
            await ask(url, drawn[half:], clients)
            after = self.counts()
        hits, misses = (now - then for now, then in zip(after, before, strict=True))
        return hits / (hits + misses)


async def measure(
    prefix: Prefix, *, tasks: int, room: int, requests: int, clients: int
) -> dict[str, Any]:
    """Hit rates by how tasks are drawn, measured and expected."""
    flags = ("--prefix-cache-bytes", str(room * prefix.nbytes))
    draw = random.Random(0)  # noqa: S311 - not for secrets
    found: dict[str, Any] = {"tasks": tasks, "room_per_replica": room}
    async with task_server(*flags) as first:
        await first.register(prefix, range(tasks))
        with running_server("--redis-url", first.store_url, *flags) as second:
            replicas = Replicas([first, replace(first, url=second.url)])
            for law, exponent in (("uniform", 0.0), ("zipf", 1.0)):
                shares = zipf(tasks, exponent)
                drawn = draw.choices([*map(task_name, range(tasks))], shares.tolist(), k=requests)
                found[law] = {
                    "hashed": await replicas.hit_rate(drawn, clients, hashed=True),
                    "hashed_expected": lru_hit_rate(shares, 2 * room),
                    "round_robin": await replicas.hit_rate(drawn, clients, hashed=False),
                    "round_robin_expected": lru_hit_rate(shares, room),
                }
    return found


def main() -> None:
    """Run and report."""
    options = arguments(__doc__ or "").parse_args()
    if NGINX is None:
        report("balancing", {"absent": "nginx is not installed: apt-get install nginx"}, {})
        return
    size = {"tasks": TASKS, "room": ROOM, "requests": REQUESTS, "clients": CLIENTS}
    if options.smoke:
        size = {"tasks": 12, "room": 3, "requests": 24, "clients": 2}
    prefix = random_prefix(load_model(), PREFIX_LENGTH, seed=0)
    results = asyncio.run(measure(prefix, **size))
    if not options.json:
        print(json.dumps(results, indent=2))
    ratios = {
        f"hit_rate_hashed_vs_round_robin_{law}": results[law]["hashed"]
        / max(results[law]["round_robin"], 1 / size["requests"])
        for law in ("uniform", "zipf")
    }
    report("balancing", results, ratios)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
