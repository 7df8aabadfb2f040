"""Prefixes as files that vLLM's processes can read."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from prefix_store.archive import artefact_path
from prefix_store.prefix import Prefix

_TMPFS = Path("/dev/shm")  # noqa: S108 - a folder of our own is made there, for this user alone
_NAME = "prefixserve-"


@dataclass(slots=True)
class _Held:
    """A prefix in the folder: requests that may still read it, and whether it was dropped."""

    prefix_length: int
    readers: int = 0
    dropped: bool = False


class PrefixFolder:
    """A private folder in memory with a file for each loaded version.

    It is locked while its server lives: the system unlocks it when that ends, in whatever way.

    A version that was dropped keeps its file while requests use it: vLLM takes a running request's
    memory away when it has none left, and reads the prefix again when the request goes on.
    """

    def __init__(self, parent: Path | None = None) -> None:
        """Make the folder, and delete those of servers that were killed.

        Args:
            parent: where; by default memory, where the system has such a place.
        """
        parent = parent or (_TMPFS if _TMPFS.is_dir() else Path(tempfile.gettempdir()))
        for path in parent.glob(f"{_NAME}*"):
            _delete_if_left_behind(path)
        # Locked before it has a name that others look at.
        hidden = Path(tempfile.mkdtemp(prefix=f".{_NAME}", dir=parent))
        lock = os.open(hidden, os.O_DIRECTORY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        self._lock = ExitStack()
        self._lock.callback(os.close, lock)
        self.path = hidden.rename(parent / hidden.name.removeprefix("."))
        self._held: dict[str, _Held] = {}

    def write(self, version: str, prefix: Prefix) -> None:
        """Put a prefix's file there, whole or not at all; on any thread. Then `add` it."""
        target = artefact_path(self.path, version)
        partial = target.with_suffix(".partial")
        try:
            partial.write_bytes(prefix.to_bytes())
            partial.replace(target)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    def add(self, version: str, prefix_length: int) -> None:
        """Count a version as loaded; its file is there."""
        held = self._held.setdefault(version, _Held(prefix_length))
        held.dropped = False

    def prefix_length(self, version: str) -> int | None:
        """Positions that a loaded version takes; None if it is not loaded."""
        held = self._held.get(version)
        return None if held is None or held.dropped else held.prefix_length

    def acquire(self, version: str) -> None:
        """Keep the file of a loaded version until `release`."""
        self._held[version].readers += 1

    def release(self, version: str) -> None:
        """Undo one `acquire`."""
        self._held[version].readers -= 1
        self._forget_unused(version)

    def drop(self, version: str) -> None:
        """Forget a version, as soon as no request uses it; unknown ones are ignored."""
        if version in self._held:
            self._held[version].dropped = True
            self._forget_unused(version)

    def close(self) -> None:
        """Delete everything; again does nothing."""
        self._held.clear()
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()

    def _forget_unused(self, version: str) -> None:
        held = self._held[version]
        if held.dropped and not held.readers:
            del self._held[version]
            artefact_path(self.path, version).unlink(missing_ok=True)


def _delete_if_left_behind(path: Path) -> None:
    """Delete a folder of this user's whose server is gone."""
    try:
        lock = os.open(path, os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # another user's, no folder, or gone
        return
    try:
        if os.fstat(lock).st_uid == os.geteuid():
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
    except BlockingIOError:  # its server lives
        pass
    finally:
        os.close(lock)
