"""Prefixes as files: what `upload` sends, how its progress is seen, what `download` writes."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol, cast

import httpx

from clients._errors import InvalidArgumentError, PrefixFileError

Progress = Callable[[int, int], None]
"""Called with the bytes sent so far and the bytes in all; starts over when an upload is retried."""

_PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")


class SupportsToBytes(Protocol):
    """Something with an artefact in it, such as `prefix_store.prefix.Prefix`."""

    def to_bytes(self) -> bytes:
        """One safetensors file."""


UploadSource = str | os.PathLike[str] | bytes | SupportsToBytes


@contextmanager
def upload_body(source: UploadSource | None, text: str | None) -> Iterator[dict[str, Any]]:
    """Arguments for httpx's `build_request`; files stay open until the block ends.

    Raises:
        InvalidArgumentError: both or neither are given.
        PrefixFileError: it is not a prefix, or cannot be read.
    """
    if (source is None) == (text is None):
        raise InvalidArgumentError("upload takes a prefix (a file, a folder, bytes) or text=...")
    if source is None:
        yield {"json": {"text": text}}
    elif isinstance(source, bytes) or hasattr(source, "to_bytes"):
        data = source if isinstance(source, bytes) else cast(SupportsToBytes, source).to_bytes()
        yield {"files": [("file", ("prefix.safetensors", BytesIO(data)))]}
    else:
        with ExitStack() as opened:
            paths = _files_of(Path(source))
            yield {
                "files": [
                    ("file", (path.name, opened.enter_context(_open(path)))) for path in paths
                ]
            }


def _files_of(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    missing = [name for name in _PEFT_FILES if not (path / name).is_file()]
    if not missing:
        return [path / name for name in _PEFT_FILES]
    if (path / "adapter_model.bin").exists():
        raise PrefixFileError(
            f"{path} has its weights in adapter_model.bin, a pickle, which is never loaded: "
            "save the adapter again with safe_serialization=True"
        )
    raise PrefixFileError(
        f"{path} is not a PEFT adapter, it has no {' and no '.join(missing)}: "
        "give such a folder or one .safetensors file"
    )


def _open(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise PrefixFileError(f"cannot read {path}: {error.strerror}") from error


class CountedStream(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A request body that reports how much of it was sent."""

    def __init__(self, request: httpx.Request, progress: Progress) -> None:
        self._body = request.stream
        self._total = int(request.headers["content-length"])
        self._progress = progress

    def __iter__(self) -> Iterator[bytes]:
        sent = 0
        for chunk in cast(httpx.SyncByteStream, self._body):
            yield chunk
            sent += len(chunk)
            self._progress(sent, self._total)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        sent = 0
        async for chunk in cast(httpx.AsyncByteStream, self._body):
            yield chunk
            sent += len(chunk)
            self._progress(sent, self._total)


def save_file(data: bytes, path: str | os.PathLike[str]) -> Path:
    """Write a file whole or not at all.

    Raises:
        PrefixFileError: it cannot be written.
    """
    target = Path(path)
    partial = target.with_name(f"{target.name}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(target)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise PrefixFileError(f"cannot write {target}: {error.strerror}") from error
    return target
