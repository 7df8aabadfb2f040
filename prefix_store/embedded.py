"""A private Valkey server for when no other store is given: a unix socket and a data directory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

from prefix_store.errors import StoreUnavailableError
from prefix_store.valkey_process import try_lock, valkey_process

_SOCKET_NAME = "valkey.sock"
_MAX_SOCKET_CHARS = 100  # Linux takes 107, macOS 103
_PLAIN = re.compile(r"[A-Za-z0-9/._+@=,-]+")  # nothing that valkey.conf would need quoted
# A process that is about to become Valkey keeps a killed owner's lock for a moment.
_LOCK_SECONDS = 1.0
_POLL_SECONDS = 0.005


class EmbeddedValkey:
    """A Valkey server that keeps every acknowledged write in `data_dir`, across restarts.

    An async context manager. One process at a time may own a data directory; a server left behind
    by an owner that was killed is stopped first.
    """

    def __init__(self, data_dir: Path, *, join: bool = False) -> None:
        """
        Args:
            join: while another process owns the directory, use the server that it runs.
        """
        self._data_dir = data_dir.expanduser().resolve()
        self._join = join
        self._opened = contextlib.ExitStack()
        self._socket: Path | None = None

    @property
    def url(self) -> str:
        """Where it listens, `unix:///...`; only while it runs."""
        if self._socket is None:
            raise RuntimeError("the embedded Valkey is not running")
        return f"unix://{quote(str(self._socket))}"

    async def start(self) -> None:
        """Start the server and wait until it answers.

        Raises:
            StoreUnavailableError: another process owns the data directory, or Valkey cannot run.
        """
        starting = asyncio.create_task(asyncio.to_thread(self._start))
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            await asyncio.wait([starting])
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop the server if it runs; the data stays."""
        await asyncio.to_thread(self._stop)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()

    def _start(self) -> None:
        try:
            with contextlib.ExitStack() as opened:
                self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
                owned = _lock(self._data_dir, opened, 0 if self._join else _LOCK_SECONDS)
                if not owned and not self._join:
                    raise StoreUnavailableError(
                        f"another server already keeps its data in {self._data_dir}; stop it, or "
                        "choose another data directory"
                    )
                folder = _plain_path(self._data_dir, opened)
                socket = folder / _SOCKET_NAME
                if owned:
                    opened.enter_context(valkey_process(folder, socket))
                self._socket = socket
                self._opened = opened.pop_all()
        except OSError as error:
            raise StoreUnavailableError(
                f"the embedded Valkey cannot start in {self._data_dir}: {error}"
            ) from error

    def _stop(self) -> None:
        self._socket = None
        self._opened.close()


def _lock(data_dir: Path, opened: contextlib.ExitStack, seconds: float) -> bool:
    """Whether nobody else has the directory, or not for long; it is ours until `opened` closes."""
    lock = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    opened.callback(os.close, lock)
    deadline = time.monotonic() + seconds
    while not try_lock(lock):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _plain_path(data_dir: Path, opened: contextlib.ExitStack) -> Path:
    """`data_dir`, or a link to it where its own path is too long for a socket or odd."""
    socket = str(data_dir / _SOCKET_NAME)
    if len(socket) <= _MAX_SOCKET_CHARS and _PLAIN.fullmatch(socket):
        return data_dir
    private = Path(tempfile.mkdtemp(prefix="prefixserve-"))
    opened.callback(shutil.rmtree, private, ignore_errors=True)
    link = private / "data"
    link.symlink_to(data_dir, target_is_directory=True)
    return link
