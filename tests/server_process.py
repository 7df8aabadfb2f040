"""A real `prefixserve serve` process, started and stopped by tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from prefix_store.data_dir import admin_key_file

READY_SECONDS = 280


@dataclass(frozen=True)
class ServerProcess:
    """A running server.

    Attributes:
        url: where it listens.
        process: its process, the first of a group; killed at the end of the test if it still runs.
        log: the file its output goes to.
        data_dir: where the admin key is.
    """

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    data_dir: Path

    @property
    def key(self) -> str:
        """The API key of its operator."""
        return admin_key_file(self.data_dir).read_text().strip()

    @property
    def headers(self) -> dict[str, str]:
        """What a request of its operator carries."""
        return {"Authorization": f"Bearer {self.key}"}

    def stop(self, timeout: float = 60) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)


def free_port() -> int:
    """A TCP port on loopback that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def running_server(model: str | Path, data_dir: Path, *flags: str) -> Iterator[ServerProcess]:
    """Start a server, wait until it is ready, stop it on the way out."""
    data_dir.mkdir(parents=True, exist_ok=True)
    log = data_dir / "server.log"
    port = free_port()
    command = [sys.executable, "-m", "clients", "serve", "--model", str(model)]
    command += ["--port", str(port), "--data-dir", str(data_dir), *flags]
    # One thread each: several servers and the tests share the machine's cores.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, process_group=0
        )
    server = ServerProcess(f"http://127.0.0.1:{port}", process, log, data_dir)
    try:
        wait_until_ready(server)
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_ready(server: ServerProcess) -> None:
    """Poll until it takes requests; an error with its log if it ends or takes too long."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        if answers(f"{server.url}/health/ready"):
            return
        time.sleep(0.05)
    raise AssertionError(f"the server did not become ready:\n{server.log.read_text()}")


def answers(url: str) -> bool:
    """Whether there is a server yet, and all is well. Leaves the processor to that server."""
    try:
        # httpx reads the authorities it trusts anew for every client; that takes 20 ms.
        return httpx.get(url, verify=False).is_success
    except httpx.TransportError:
        return False
