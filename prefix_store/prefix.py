"""A prefix: trained keys and values per layer, and its one serialisation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from prefix_store.errors import InvalidPrefixError

FORMAT = "prefixserve/1"
# One metadata entry only: safetensors writes several in no fixed order, and equal prefixes must
# have equal bytes.
METADATA_KEY = "prefixserve"
KEYS = "decoder.keys"
VALUES = "decoder.values"


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """Keys and values put in front of every request of a task. Immutable; share it freely.

    Attributes:
        keys, values: `[num_layers, num_kv_heads, prefix_length, head_dim]`, floating point, as the
            attention uses them (a rotary model's keys are already rotated).
        method: how it was made, e.g. `prefix-tuning`, `cartridge`, `text`.
        base_model: name of the base model it was made for, or empty when unknown.
        fingerprint: `base_model.fingerprint()` of that model, or empty when unknown.
        template: text around a request's input, with `{source}` where the input goes; empty for
            the input as it is.
        training: anything worth keeping about the training, as strings.
    """

    keys: torch.Tensor
    values: torch.Tensor
    method: str
    base_model: str = ""
    fingerprint: str = ""
    template: str = ""
    training: Mapping[str, str] = field(default_factory=dict)

    @property
    def prefix_length(self) -> int:
        """Number of positions the prefix takes."""
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.keys.nbytes + self.values.nbytes

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Prefix:
        """The same prefix with its tensors elsewhere; shares storage where nothing changes."""
        return Prefix(
            self.keys.to(device, dtype),
            self.values.to(device, dtype),
            self.method,
            self.base_model,
            self.fingerprint,
            self.template,
            self.training,
        )

    def to_bytes(self) -> bytes:
        """One safetensors file; equal prefixes give equal bytes."""
        metadata = {
            "format": FORMAT,
            "method": self.method,
            "base_model": self.base_model,
            "fingerprint": self.fingerprint,
            "template": self.template,
            "training": dict(self.training),
        }
        tensors = {KEYS: self.keys.cpu().contiguous(), VALUES: self.values.cpu().contiguous()}
        return save_safetensors(tensors, {METADATA_KEY: json.dumps(metadata, sort_keys=True)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Prefix:
        """Read `to_bytes` back.

        Raises:
            InvalidPrefixError: not safetensors, or not this format.
        """
        try:
            tensors = load_safetensors(data)
        except (SafetensorError, ValueError) as error:
            raise InvalidPrefixError(f"not a readable safetensors file: {error}") from error
        raise NotImplementedError(tensors)


def version_of(data: bytes) -> str:
    """The name of an artefact: `sha256:` and the hex digest of its bytes."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
