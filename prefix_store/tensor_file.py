"""Read an untrusted safetensors file: sizes bounded before anything is parsed, never a pickle."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from prefix_store.errors import InvalidPrefixError

MAX_HEADER_BYTES = 512 * 1024
_LENGTH_BYTES = 8
_SIGNATURES = {
    b"PK\x03\x04": "a zip archive, as torch.save writes: a pickle inside",
    b"\x80": "a Python pickle",
    b"GGUF": "a GGUF file",
}


def read_tensor_file(
    data: bytes, names: Collection[str]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors called `names` and the file's metadata; the file must hold exactly those tensors.

    Raises:
        InvalidPrefixError: not safetensors, damaged, a header over `MAX_HEADER_BYTES`, or other
            tensors than `names`.
    """
    header = _header(data)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise InvalidPrefixError("the safetensors metadata is not a JSON object")
    if set(header) != set(names):
        raise InvalidPrefixError(
            f"the file holds the tensors {_listed(header)}; expected exactly {_listed(names)}"
        )
    try:
        tensors = load_safetensors(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise InvalidPrefixError(
            f"the safetensors file is truncated or damaged: {error}"
        ) from error
    return tensors, metadata


def tensor_names(data: bytes) -> set[str]:
    """What the tensors of a safetensors file are called.

    Raises:
        InvalidPrefixError: as `read_tensor_file`.
    """
    return set(_header(data)) - {"__metadata__"}


def is_tensor_file(data: bytes) -> bool:
    """Whether the bytes begin as safetensors: a header's length, below 4 GiB, and a JSON object."""
    return data[4:_LENGTH_BYTES] == bytes(4) and data[_LENGTH_BYTES : _LENGTH_BYTES + 1] == b"{"


def check_tensor_file(name: str, data: bytes) -> None:
    """Refuse bytes that do not begin as safetensors, saying what they look like.

    Raises:
        InvalidPrefixError: `not is_tensor_file(data)`; calls the bytes `name`.
    """
    if not is_tensor_file(data):
        raise InvalidPrefixError(f"{name} is not safetensors: {_guess(data)}")


def _header(data: bytes) -> dict[str, Any]:
    check_tensor_file("the file", data)
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise InvalidPrefixError(
            f"the safetensors header says it is {length} bytes long; at most {MAX_HEADER_BYTES} "
            "are accepted"
        )
    if length > len(data) - _LENGTH_BYTES:
        raise InvalidPrefixError(
            f"the safetensors file is truncated: its header is {length} bytes long and "
            f"{len(data) - _LENGTH_BYTES} are there"
        )
    try:
        header = json.loads(data[_LENGTH_BYTES : _LENGTH_BYTES + length])
    except (ValueError, RecursionError) as error:
        raise InvalidPrefixError("the safetensors header is not JSON") from error
    return cast("dict[str, Any]", header)


def _guess(data: bytes) -> str:
    if not data:
        return "it is empty"
    for signature, meaning in _SIGNATURES.items():
        if data.startswith(signature):
            return f"it looks like {meaning}; save the tensors with safetensors instead"
    return f"it begins with {data[:_LENGTH_BYTES]!r}"


def _listed(names: Collection[str]) -> str:
    shown = [repr(name[:60]) for name in sorted(names)[:5]]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "none"
