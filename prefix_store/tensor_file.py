"""Read an untrusted safetensors file: sizes bounded before anything is parsed, never a pickle."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from mmap import mmap
from typing import Any, cast

import torch

from prefix_store.errors import InvalidPrefixError

Buffer = bytes | bytearray | mmap
MAX_HEADER_BYTES = 512 * 1024
_LENGTH_BYTES = 8
_DTYPES = {
    "C64": torch.complex64,
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_SIGNATURES = {
    b"PK\x03\x04": "a zip archive, as torch.save writes: a pickle inside",
    b"\x80": "a Python pickle",
    b"GGUF": "a GGUF file",
}


def read_tensor_file(
    data: Buffer, names: Collection[str]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors called `names` and the file's metadata; the file must hold exactly those tensors.

    The tensors are views of `data` where it may be written to (a bytearray, an mmap with
    ACCESS_COPY), so that a large file is in memory once; the caller leaves it alone then.

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
    return _views(data, header), metadata


def tensor_names(data: Buffer) -> set[str]:
    """What the tensors of a safetensors file are called.

    Raises:
        InvalidPrefixError: as `read_tensor_file`.
    """
    return set(_header(data)) - {"__metadata__"}


def is_tensor_file(data: Buffer) -> bool:
    """Whether the bytes begin as safetensors: a header's length, below 4 GiB, and a JSON object."""
    return data[4:_LENGTH_BYTES] == bytes(4) and data[_LENGTH_BYTES : _LENGTH_BYTES + 1] == b"{"


def check_tensor_file(name: str, data: Buffer) -> None:
    """Refuse bytes that do not begin as safetensors, saying what they look like.

    Raises:
        InvalidPrefixError: `not is_tensor_file(data)`; calls the bytes `name`.
    """
    if not is_tensor_file(data):
        raise InvalidPrefixError(f"{name} is not safetensors: {_guess(data)}")


def _header(data: Buffer) -> dict[str, Any]:
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


def _views(data: Buffer, header: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors, which must fill the file after its header without a gap or an overlap."""
    start = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
    memory = bytearray(data) if isinstance(data, bytes) else data
    tensors = {}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: _offsets(*item)):
        dtype, shape = _type_and_shape(name, entry)
        begin, stop = _offsets(name, entry)
        nbytes = math.prod(shape) * dtype.itemsize
        if begin != end or stop - begin != nbytes or start + stop > len(data):
            raise InvalidPrefixError(
                f"the safetensors file is truncated or damaged: {name[:60]!r} lies at "
                f"{begin} to {stop}; expected {nbytes} bytes from {end} on, of "
                f"{len(data) - start} that are there"
            )
        end = stop
        tensors[name] = _view(memory, dtype, start + begin, shape)
    if start + end != len(data):
        raise InvalidPrefixError(
            f"the safetensors file is damaged: {len(data) - start - end} bytes follow its tensors"
        )
    return tensors


def _view(
    memory: bytearray | mmap, dtype: torch.dtype, offset: int, shape: list[int]
) -> torch.Tensor:
    count = math.prod(shape)
    if count == 0:  # frombuffer takes no empty ones
        return torch.empty(shape, dtype=dtype)
    raw = torch.frombuffer(memory, dtype=torch.uint8, offset=offset, count=count * dtype.itemsize)
    if raw.data_ptr() % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).reshape(shape)


def _offsets(name: str, entry: Any) -> tuple[int, int]:
    match entry:
        case {"data_offsets": [int(begin), int(end)]} if 0 <= begin <= end:
            return begin, end
    raise _damaged(name, entry)


def _type_and_shape(name: str, entry: Any) -> tuple[torch.dtype, list[int]]:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape)} if dtype in _DTYPES and all(
            isinstance(size, int) and size >= 0 for size in shape
        ):
            return _DTYPES[dtype], shape
    raise _damaged(name, entry)


def _damaged(name: str, entry: Any) -> InvalidPrefixError:
    return InvalidPrefixError(
        f"the safetensors header says of {name[:60]!r} {str(entry)[:120]}; expected a dtype of "
        f"{', '.join(_DTYPES)}, a shape, and data_offsets within the file"
    )


def _guess(data: Buffer) -> str:
    if not data:
        return "it is empty"
    for signature, meaning in _SIGNATURES.items():
        if data[: len(signature)] == signature:
            return f"it looks like {meaning}; save the tensors with safetensors instead"
    return f"it begins with {data[:_LENGTH_BYTES]!r}"


def _listed(names: Collection[str]) -> str:
    shown = [repr(name[:60]) for name in sorted(names)[:5]]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "none"
