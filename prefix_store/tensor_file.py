"""Read an untrusted safetensors file: sizes bounded before anything is parsed, never a pickle.

The format: a length in 8 bytes, a JSON header of that length, and the tensors' numbers
(https://github.com/huggingface/safetensors#format). The library's own reader takes `bytes` only and
copies; this one reads any buffer, a memory map too, and its tensors are views of it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from mmap import mmap
from typing import Any

import torch

from prefix_store.errors import InvalidPrefixError
from prefix_store.strict_json import parse_object

Buffer = bytes | bytearray | memoryview | mmap
"""Bytes, wherever they lie."""

# Read-only memory is what an immutable value wants.
warnings.filterwarnings("ignore", message="The given buffer is not writable")

MAX_HEADER_BYTES = 512 * 1024
_MAX_DIMENSIONS = 8
_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_CONVERT = (
    "convert it where you trust it: safetensors.torch.save_file(torch.load(FILE, "
    "weights_only=True), 'adapter_model.safetensors')"
)
_SIGNATURES = {
    b"PK\x03\x04": f"a zip archive, as torch.save writes: a pickle inside; {_CONVERT}",
    b"\x80": f"a Python pickle; {_CONVERT}",
    b"GGUF": "a GGUF file; save the tensors with safetensors instead",
}


def read_tensor_file(
    data: Buffer, names: Collection[str]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors called `names` and the file's metadata; the file must hold exactly those tensors.

    The tensors are views of `data`, which must not change while they are used, wherever their
    numbers are aligned in memory.

    Raises:
        InvalidPrefixError: not safetensors, damaged, a header over `MAX_HEADER_BYTES`, or other
            tensors than `names`.
    """
    header, start = _header(data)
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InvalidPrefixError("the safetensors metadata is not a JSON object of texts")
    if set(header) != set(names):
        raise InvalidPrefixError(
            f"the file holds the tensors {_listed(header)}; expected exactly {_listed(names)}"
        )
    entries = {name: _Entry.of(name, entry) for name, entry in header.items()}
    _check_layout(entries, len(data) - start)
    return {name: _tensor(data, start, entry) for name, entry in entries.items()}, metadata


def tensor_names(data: Buffer) -> set[str]:
    """What the tensors of a safetensors file are called.

    Raises:
        InvalidPrefixError: as `read_tensor_file`.
    """
    return set(_header(data)[0]) - {_METADATA}


def is_tensor_file(data: Buffer) -> bool:
    """Whether the bytes begin as safetensors: a header's length, below 4 GiB, and a JSON object."""
    head = bytes(data[: _LENGTH_BYTES + 1])
    return head[4:_LENGTH_BYTES] == bytes(4) and head[_LENGTH_BYTES:] == b"{"


def check_tensor_file(name: str, data: Buffer) -> None:
    """Refuse bytes that do not begin as safetensors, saying what they look like.

    Raises:
        InvalidPrefixError: `not is_tensor_file(data)`; calls the bytes `name`.
    """
    if not is_tensor_file(data):
        raise InvalidPrefixError(f"{name} is not safetensors: {_guess(bytes(data[:16]))}")


@dataclass(frozen=True, slots=True)
class _Entry:
    """What the header says of one tensor; `begin` and `end` count from the header's end."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @classmethod
    def of(cls, name: str, entry: object) -> _Entry:
        if not isinstance(entry, Mapping) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise InvalidPrefixError(
                f"the header's entry of {name!r} is {str(entry)[:80]}; expected dtype, shape and "
                "data_offsets"
            )
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise InvalidPrefixError(
                f"{name!r} has dtype {str(dtype)[:20]!r}; expected one of F16, BF16, F32"
            )
        if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
            raise InvalidPrefixError(
                f"{name!r} has shape {str(shape)[:80]} and data_offsets {str(offsets)[:80]}; "
                f"expected at most {_MAX_DIMENSIONS} sizes and two offsets, whole numbers from 0"
            )
        found, expected = offsets[1] - offsets[0], math.prod(shape) * _DTYPES[dtype].itemsize
        if found != expected:
            raise InvalidPrefixError(
                f"{name!r} has data_offsets {offsets}, {found} bytes; expected {expected} bytes "
                f"for {dtype} of shape {shape}"
            )
        return cls(_DTYPES[dtype], tuple(shape), *offsets)


def _are_sizes(values: Any) -> bool:
    # A bool is an int to Python, but not to the format.
    return (
        isinstance(values, list)
        and len(values) <= _MAX_DIMENSIONS
        and all(type(v) is int and 0 <= v < 2**63 for v in values)
    )


def _check_layout(entries: Mapping[str, _Entry], size: int) -> None:
    """Each byte after the header belongs to one tensor, so that nothing overlaps or is hidden."""
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at:
            raise InvalidPrefixError(
                f"{name!r} begins at byte {entry.begin} of the data; expected {at}, where the "
                "tensor before it ends: tensors may neither overlap nor leave gaps"
            )
        at = entry.end
    if at != size:
        state = "is truncated" if at > size else "has bytes that belong to no tensor"
        raise InvalidPrefixError(
            f"the safetensors file {state}: its tensors end at byte {at} of the data, which has "
            f"{size} bytes"
        )


# Nothing writes to a prefix's tensors, so they may be views of memory that is read-only.
warnings.filterwarnings("ignore", message="The given buffer is not writable")


def _tensor(data: Buffer, start: int, entry: _Entry) -> torch.Tensor:
    if entry.begin == entry.end:  # which torch.frombuffer refuses
        return torch.empty(entry.shape, dtype=entry.dtype)
    count, offset = math.prod(entry.shape), start + entry.begin
    tensor = torch.frombuffer(data, dtype=entry.dtype, count=count, offset=offset)
    aligned = tensor.data_ptr() % entry.dtype.itemsize == 0
    return (tensor if aligned else tensor.clone()).view(entry.shape)


def _header(data: Buffer) -> tuple[dict[str, Any], int]:
    """The header, and where it ends."""
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
    end = _LENGTH_BYTES + length
    return parse_object("the safetensors header", bytes(data[_LENGTH_BYTES:end])), end


def _guess(head: bytes) -> str:
    if not head:
        return "it is empty"
    for signature, meaning in _SIGNATURES.items():
        if head.startswith(signature):
            return f"it looks like {meaning}"
    return f"it begins with {head[:_LENGTH_BYTES]!r}"


def _listed(names: Collection[str]) -> str:
    shown = [repr(name[:60]) for name in sorted(names)[:5]]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "none"
