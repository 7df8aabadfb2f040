"""Adapters that lie in a folder of this machine."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from prefix_store.errors import PrefixTooLargeError
from prefix_store.peft_adapter import CONFIG_NAME, WEIGHTS_NAME
from prefix_store.tensor_file import Buffer
from server.errors import InvalidRequestError

_ARTEFACT = "*.safetensors"


def read_adapter(root: Path, path: str, max_bytes: int) -> list[tuple[str, Buffer]]:
    """Names and contents of an adapter's files: PEFT's two, or the one artefact of ours.

    Nothing outside `root` is opened, whatever `path` and the links in it say, and nothing that is
    not a regular file.

    Args:
        path: a folder below `root`, absolute or from there.

    Raises:
        InvalidRequestError: it is not there, not below `root`, or has no adapter.
        PrefixTooLargeError: more than `max_bytes` in all.
    """
    root = root.resolve()
    folder = _below(root, root / path, path)
    pair = [folder / CONFIG_NAME, folder / WEIGHTS_NAME]
    files = pair if pair[0].exists() else sorted(folder.glob(_ARTEFACT))
    if files != pair and len(files) != 1:
        raise InvalidRequestError(
            f"{path[:200]!r} has {len(files)} files {_ARTEFACT}; expected {CONFIG_NAME} and "
            f"{WEIGHTS_NAME}, or one prefix artefact"
        )
    contents: list[tuple[str, Buffer]] = []
    left = max_bytes
    for file in files:
        data = _contents(_below(root, file, path), left + 1)
        left -= len(data)
        if left < 0:
            raise PrefixTooLargeError(
                f"{path[:200]!r} is over this server's limit of {max_bytes} bytes; its operator "
                "can raise --max-upload-bytes"
            )
        contents.append((file.name, data))
    return contents


def _below(root: Path, path: Path, named: str) -> Path:
    """Where `path` leads, if that is below `root`; what is elsewhere is as if it were not there."""
    try:
        found = path.resolve(strict=True)
    except (OSError, ValueError, RuntimeError):
        found = None
    if found is None or root not in found.parents:
        raise InvalidRequestError(
            f"there is no adapter at {named[:200]!r} below this server's --adapter-dir"
        )
    return found


def _contents(file: Path, most: int) -> bytes:
    try:
        with open(file, "rb", opener=_open) as opened:
            if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
                raise InvalidRequestError(f"{file.name!r} is not a regular file")
            return opened.read(most)
    except OSError as error:
        raise InvalidRequestError(f"cannot read {file.name!r}: {error.strerror}") from error


def _open(path: str, flags: int) -> int:
    # Not through a link put there since, and without waiting for what is no file.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
