"""Files that begin as safetensors and are wrong in one place."""

from __future__ import annotations

import json
import struct
from typing import Any

from prefix_store.tensor_file import MAX_HEADER_BYTES
from tests.prefix_store.examples import KEYS, VALUES


def with_header(header: bytes, numbers: bytes) -> bytes:
    """A file with this header, whatever it says."""
    return struct.pack("<Q", len(header)) + header + numbers


def damaged(artefact: bytes) -> dict[str, tuple[bytes, str]]:
    """What is wrong, the file, and a part of what must be said of it."""
    end = 8 + int.from_bytes(artefact[:8], "little")
    header, numbers = json.loads(artefact[8:end]), artefact[end:]
    half = len(numbers) // 2
    assert header[VALUES]["data_offsets"] == [half, 2 * half]

    def changed(tensor: str = VALUES, /, **fields: Any) -> bytes:
        entry = header[tensor] | fields
        entry = {name: value for name, value in entry.items() if value is not None}
        return with_header(json.dumps(header | {tensor: entry}).encode(), numbers)

    def twice(name: str) -> bytes:
        key = json.dumps(name).encode() + b":"
        text = json.dumps(header, separators=(",", ":")).encode()
        again = key + json.dumps(header[KEYS].get(name, header[KEYS])).encode() + b","
        return with_header(text.replace(key, again + key, 1), numbers)

    none = {"shape": [2, 3, 0, 4], "data_offsets": [half, half]}
    return {
        "half a header": (artefact[: end - 9], "truncated: its header"),
        "a header beyond the limit": (
            struct.pack("<Q", MAX_HEADER_BYTES + 1) + artefact[8:],
            f"at most {MAX_HEADER_BYTES}",
        ),
        "a header of gigabytes": (b"\xff" * 8 + artefact[8:], "not safetensors"),
        "a header that is a list": (with_header(b"[1]", numbers), "not safetensors"),
        "a header that is not JSON": (with_header(b"{]", numbers), "not JSON"),
        "a tensor twice": (twice(KEYS), f"the key '{KEYS}' twice"),
        "a field twice": (twice("dtype"), "the key 'dtype' twice"),
        "a tensor on the other": (
            changed(data_offsets=[half - 4, 2 * half - 4]),
            f"begins at byte {half - 4} of the data; expected {half}",
        ),
        "both tensors in one place": (changed(data_offsets=[0, half]), "neither overlap"),
        "a gap": (
            changed(KEYS, shape=[1], data_offsets=[0, 4]),
            f"byte {half} of the data; expected 4",
        ),
        "offsets beyond the end": (
            changed(data_offsets=[half + 4, 2 * half + 4]),
            "nor leave gaps",
        ),
        "a tensor longer than the file": (
            with_header(artefact[8:end], numbers[:-4]),
            "is truncated",
        ),
        "bytes of no tensor": (artefact + b"x", "belong to no tensor"),
        "offsets backwards": (changed(data_offsets=[2 * half, half]), f"-{half} bytes; expected"),
        "offsets below zero": (changed(data_offsets=[-half, 0]), "whole numbers from 0"),
        "three offsets": (changed(data_offsets=[0, 4, 8]), "two offsets"),
        "an offset that is true": (changed(data_offsets=[True, half]), "whole numbers"),
        "a shape that is larger than its bytes": (changed(shape=[2**40, 2**40]), "expected 4835"),
        "a shape of fractions": (changed(shape=[2.0, 3, 5, 4]), "whole numbers"),
        "a shape of a thousand dimensions": (changed(shape=[1] * 1000), "at most 8 sizes"),
        "no shape": (changed(shape=None), "expected dtype, shape and data_offsets"),
        "an entry that is a number": (
            with_header(json.dumps(header | {KEYS: 3}).encode(), numbers),
            f"entry of '{KEYS}' is 3",
        ),
        "a tensor without numbers": (
            with_header(
                json.dumps(header | {VALUES: header[VALUES] | none}).encode(), numbers[:half]
            ),
            "none of them 0",
        ),
        "a dtype nobody knows": (changed(dtype="F4"), "dtype 'F4'; expected one of F16, BF16, F32"),
        "a dtype that is a number": (changed(dtype=32), "dtype '32'"),
        "whole numbers": (changed(dtype="I32"), "values has dtype int32; expected one of float16"),
        "metadata that is not text": (
            with_header(json.dumps(header | {"__metadata__": {"a": 1}}).encode(), numbers),
            "metadata is not",
        ),
    }
