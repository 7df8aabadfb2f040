"""A prefix: trained keys and values per layer, and its one serialisation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from safetensors.torch import save as save_safetensors

from prefix_store.errors import InvalidPrefixError
from prefix_store.strict_json import parse_object
from prefix_store.tensor_file import Buffer, read_tensor_file

FORMAT = "prefixserve/1"
# One metadata entry only: safetensors writes several in no fixed order, and equal prefixes must
# have equal bytes.
METADATA_KEY = "prefixserve"
KEYS = "decoder.keys"
VALUES = "decoder.values"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SOURCE = "{source}"

MAX_NAME_CHARS = 256
MAX_TEMPLATE_CHARS = 4096
MAX_TRAINING_CHARS = 16384


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """Keys and values put in front of every request of a task. Valid, immutable; share it freely.

    Attributes:
        keys, values: `[num_layers, num_kv_heads, prefix_length, head_dim]`, float16, bfloat16 or
            float32, finite, as the attention uses them (a rotary model's keys are already rotated).
        method: how it was made, e.g. `prefix-tuning`, `cartridge`, `text`.
        base_model: name of the base model it was made for, or empty when unknown.
        fingerprint: `base_model.fingerprint()` of that model, or empty when unknown.
        template: text around a request's input, with `{source}` where the input goes; empty for
            the input as it is.
        training: anything worth keeping about the training, as strings.

    Raises:
        InvalidPrefixError: a tensor or a text is not as above, or a text is too long.
    """

    keys: torch.Tensor
    values: torch.Tensor
    method: str
    base_model: str = ""
    fingerprint: str = ""
    template: str = ""
    training: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_tensor(KEYS, self.keys, ndim=4)
        check_tensor(VALUES, self.values, ndim=4)
        if (self.keys.shape, self.keys.dtype) != (self.values.shape, self.values.dtype):
            raise InvalidPrefixError(
                f"{KEYS} is {_described(self.keys)} and {VALUES} is {_described(self.values)}; "
                "expected the same shape and dtype"
            )
        for name in ("method", "base_model", "fingerprint"):
            check_name(name, getattr(self, name))
        check_template(self.template)
        _check_training(self.training)

    @property
    def prefix_length(self) -> int:
        """Number of positions the prefix takes."""
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.keys.nbytes + self.values.nbytes

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Prefix:
        """The same prefix with contiguous tensors elsewhere; shares storage if nothing changes.

        Raises:
            InvalidPrefixError: a number is too large for `dtype`.
        """
        keys, values = (t.to(device, dtype).contiguous() for t in (self.keys, self.values))
        if keys is self.keys and values is self.values:
            return self
        return replace(self, keys=keys, values=values)

    def to_bytes(self) -> bytes:
        """One safetensors file; equal prefixes give equal bytes."""
        metadata = {
            "format": FORMAT,
            **{name: getattr(self, name) for name in _TEXT_FIELDS},
            "training": dict(self.training),
        }
        tensors = {KEYS: _own_copy(self.keys), VALUES: _own_copy(self.values)}
        return save_safetensors(tensors, {METADATA_KEY: json.dumps(metadata, sort_keys=True)})

    @classmethod
    def from_bytes(cls, data: Buffer) -> Prefix:
        """Read `to_bytes` back; the tensors are views of `data`, which must not change.

        Raises:
            InvalidPrefixError: not safetensors, not this format, or not a valid prefix.
        """
        tensors, metadata = read_tensor_file(data, (KEYS, VALUES))
        return cls(tensors[KEYS], tensors[VALUES], **_own_metadata(metadata))


_TEXT_FIELDS = ("method", "base_model", "fingerprint", "template")


def check_tensor(name: str, tensor: torch.Tensor, *, ndim: int) -> None:
    """Refuse a tensor that no prefix can be made of.

    Raises:
        InvalidPrefixError: other than `ndim` dimensions, empty, a dtype not in `DTYPES`, NaN, Inf.
    """
    if tensor.ndim != ndim or tensor.numel() == 0:
        raise InvalidPrefixError(
            f"{name} has shape {list(tensor.shape)}; expected {ndim} dimensions, none of them 0"
        )
    if tensor.dtype not in DTYPES:
        accepted = ", ".join(_dtype_name(dtype) for dtype in DTYPES)
        raise InvalidPrefixError(
            f"{name} has dtype {_dtype_name(tensor.dtype)}; expected one of {accepted}"
        )
    # Extremes propagate NaN, and finding them takes a tenth of the time of looking at each number.
    if not bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
        kind = "NaN" if bool(torch.isnan(tensor).any()) else "Inf"
        raise InvalidPrefixError(f"{name} holds {kind}; expected finite numbers only")


def _own_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    if METADATA_KEY not in metadata:
        raise InvalidPrefixError(
            f"the file has no {METADATA_KEY!r} metadata: it is safetensors, but not a prefix. "
            "Make one with Prefix.to_bytes, or upload both files of a PEFT adapter."
        )
    found = parse_object(f"the {METADATA_KEY!r} metadata", metadata[METADATA_KEY])
    if found.pop("format", None) != FORMAT:
        raise InvalidPrefixError(f"the {METADATA_KEY!r} metadata does not have format {FORMAT!r}")
    expected = {*_TEXT_FIELDS, "training"}
    if set(found) != expected:
        raise InvalidPrefixError(
            f"the {METADATA_KEY!r} metadata has {sorted(found)[:10]}; expected {sorted(expected)}"
        )
    return found


def check_name(name: str, value: object) -> None:
    """Refuse what is not a short printable text.

    Raises:
        InvalidPrefixError
    """
    if not isinstance(value, str) or len(value) > MAX_NAME_CHARS or not value.isprintable():
        raise InvalidPrefixError(
            f"{name} is {str(value)[:40]!r}; expected printable text of at most "
            f"{MAX_NAME_CHARS} characters"
        )


def check_template(value: object) -> None:
    """Refuse what is neither empty nor text of bearable length with `{source}` in it.

    Raises:
        InvalidPrefixError
    """
    if not isinstance(value, str) or len(value) > MAX_TEMPLATE_CHARS:
        raise InvalidPrefixError(
            f"template is {str(value)[:40]!r}; expected text of at most {MAX_TEMPLATE_CHARS} "
            "characters"
        )
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise InvalidPrefixError("template holds half a surrogate pair; expected Unicode text")
    if value and SOURCE not in value:
        raise InvalidPrefixError(
            f"template is {value[:40]!r}; expected {SOURCE} where the input goes, or nothing"
        )


def _check_training(value: object) -> None:
    if not isinstance(value, Mapping) or not all(
        isinstance(text, str) for entry in value.items() for text in entry
    ):
        raise InvalidPrefixError("training is not a mapping of text to text")
    chars = sum(len(key) + len(text) for key, text in value.items())
    if chars > MAX_TRAINING_CHARS:
        raise InvalidPrefixError(
            f"training has {chars} characters; expected at most {MAX_TRAINING_CHARS}"
        )


def _own_copy(tensor: torch.Tensor) -> torch.Tensor:
    # safetensors refuses to write one tensor under two names.
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _described(tensor: torch.Tensor) -> str:
    return f"{_dtype_name(tensor.dtype)} {list(tensor.shape)}"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def version_of(data: Buffer) -> str:
    """The name of an artefact: `sha256:` and the hex digest of its bytes."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
