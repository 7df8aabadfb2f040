"""A prefix: trained keys and values per layer, and its one serialisation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from safetensors.torch import save as save_safetensors

from prefix_store.errors import InvalidPrefixError
from prefix_store.groups import DECODER, GROUPS, Group, KeysValues, dtype_name, group_tensors
from prefix_store.strict_json import parse_object
from prefix_store.tensor_file import Buffer, read_tensor_file, tensor_names

FORMAT = "prefixserve/1"
# One metadata entry only: safetensors writes several in no fixed order, and equal prefixes must
# have equal bytes.
METADATA_KEY = "prefixserve"
SOURCE = "{source}"

MAX_NAME_CHARS = 256
MAX_TEMPLATE_CHARS = 4096
MAX_TRAINING_CHARS = 16384


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """Keys and values put in front of every request of a task. Valid, immutable; share it freely.

    Attributes:
        groups: keys and values by where attention reads them; of one length, dtype and device. One
            at least.
        method: how it was made, e.g. `prefix-tuning`, `cartridge`, `text`.
        base_model: name of the base model it was made for, or empty when unknown.
        fingerprint: `base_model.fingerprint()` of that model, or empty when unknown.
        template: text around a request's input, with `{source}` where the input goes; empty for
            the input as it is.
        training: anything worth keeping about the training, as strings.
        encoder_decoder: whether that model has an encoder; without, there is only `decoder`.

    Raises:
        InvalidPrefixError: a group or a text is not as above, or a text is too long.
    """

    groups: Mapping[Group, KeysValues]
    method: str
    base_model: str = ""
    fingerprint: str = ""
    template: str = ""
    training: Mapping[str, str] = field(default_factory=dict)
    encoder_decoder: bool = False

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor, method: str, **fields: Any) -> Self:
        """A prefix of the decoder's self-attention alone, `[num_layers, num_kv_heads,
        prefix_length, head_dim]` each.

        Raises:
            InvalidPrefixError
        """
        return cls({DECODER: KeysValues(keys, values)}, method, **fields)

    def __post_init__(self) -> None:
        _check_groups(self.groups, self.encoder_decoder)
        for name in ("method", "base_model", "fingerprint"):
            check_name(name, getattr(self, name))
        check_template(self.template)
        _check_training(self.training)

    @property
    def keys(self) -> torch.Tensor:
        """The decoder's; a prefix of a decoder-only model has them."""
        return self.groups[DECODER].keys

    @property
    def values(self) -> torch.Tensor:
        """The decoder's; a prefix of a decoder-only model has them."""
        return self.groups[DECODER].values

    @property
    def prefix_length(self) -> int:
        """Number of positions that each group takes."""
        return next(iter(self.groups.values())).prefix_length

    def length_in(self, group: Group) -> int:
        """Number of positions that it takes in one group; 0 where it has none."""
        return self.prefix_length if group in self.groups else 0

    @property
    def dtype(self) -> torch.dtype:
        """Of every tensor."""
        return next(iter(self.groups.values())).keys.dtype

    @property
    def device(self) -> torch.device:
        """Of every tensor."""
        return next(iter(self.groups.values())).keys.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(group.nbytes for group in self.groups.values())

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Prefix:
        """The same prefix with every tensor changed; itself if nothing changes.

        Raises:
            InvalidPrefixError: it is no prefix any more.
        """
        groups = {name: group.mapped(change) for name, group in self.groups.items()}
        if all(groups[name] is group for name, group in self.groups.items()):
            return self
        return replace(self, groups=groups)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Prefix:
        """The same prefix with contiguous tensors elsewhere; shares storage if nothing changes.

        Raises:
            InvalidPrefixError: a number is too large for `dtype`.
        """
        return self.mapped(lambda tensor: tensor.to(device, dtype).contiguous())

    def to_bytes(self) -> bytes:
        """One safetensors file; equal prefixes give equal bytes."""
        metadata = {
            "format": FORMAT,
            **{name: getattr(self, name) for name in _TEXT_FIELDS},
            "training": dict(self.training),
        }
        if self.encoder_decoder:
            metadata[_GROUPS] = sorted(self.groups)
        tensors = {
            name: _own_copy(tensor)
            for keys_values in self.groups.values()
            for name, tensor in keys_values.named().items()
        }
        return save_safetensors(tensors, {METADATA_KEY: json.dumps(metadata, sort_keys=True)})

    @classmethod
    def from_bytes(cls, data: Buffer) -> Prefix:
        """Read `to_bytes` back; the tensors are views of `data`, which must not change.

        Raises:
            InvalidPrefixError: not safetensors, not this format, or not a valid prefix.
        """
        found = _groups_of(tensor_names(data)) or (DECODER,)
        names = [name for group in found for name in group_tensors(group)]
        tensors, metadata = read_tensor_file(data, names)
        own = _own_metadata(metadata)
        named = own.pop(_GROUPS, None)
        if named is not None and named != sorted(found):
            raise InvalidPrefixError(
                f"the {METADATA_KEY!r} metadata names the groups {str(named)[:80]}, and the file "
                f"holds keys and values of {', '.join(sorted(found))}; expected the same"
            )
        groups = {}
        for group in found:
            keys, values = (tensors[name] for name in group_tensors(group))
            groups[group] = KeysValues(keys, values, group)
        return cls(groups, **own, encoder_decoder=named is not None)


_GROUPS = "groups"
_TEXT_FIELDS = ("method", "base_model", "fingerprint", "template")


def _check_groups(groups: Mapping[Group, KeysValues], encoder_decoder: bool) -> None:
    if not groups or not set(groups) <= set(GROUPS if encoder_decoder else (DECODER,)):
        accepted = "one or more of " + ", ".join(GROUPS) if encoder_decoder else DECODER
        raise InvalidPrefixError(
            f"the prefix has keys and values for {', '.join(sorted(groups)) or 'nothing'}; "
            f"expected {accepted}"
        )
    (first, one), *others = groups.items()
    for name, other in others:
        for what, found, expected in (
            ("prefix length", other.prefix_length, one.prefix_length),
            ("dtype", dtype_name(other.keys.dtype), dtype_name(one.keys.dtype)),
        ):
            if found != expected:
                raise InvalidPrefixError(
                    f"{name} has {what} {found} and {first} has {expected}; expected the same"
                )


def _groups_of(names: Collection[str]) -> tuple[Group, ...]:
    return tuple(group for group in GROUPS if set(group_tensors(group)) & set(names))


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
    if set(found) - {_GROUPS} != expected:
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


def version_of(data: Buffer) -> str:
    """The name of an artefact: `sha256:` and the hex digest of its bytes."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
