"""Import the prefix encoder of P-tuning v2 (Liu et al. 2021, github.com/THUDM/P-tuning-v2)."""

from __future__ import annotations

from collections.abc import Collection

import torch

from prefix_store.base_model import BaseModelSpec
from prefix_store.errors import IncompatiblePrefixError, InvalidPrefixError
from prefix_store.groups import check_tensor
from prefix_store.key_value_matrix import num_columns, split_keys_and_values
from prefix_store.prefix import Prefix
from prefix_store.tensor_file import Buffer, read_tensor_file, tensor_names

METHOD = "p-tuning-v2"
_MODULE = "prefix_encoder."
_EMBEDDING = f"{_MODULE}embedding.weight"
_PROJECTION = tuple(
    f"{_MODULE}trans.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")
)


def is_ptuning_v2(names: Collection[str]) -> bool:
    """Whether tensors of these names are a model, or a part of one, with a prefix encoder."""
    return any(name.endswith(_EMBEDDING) for name in names)


def from_ptuning_v2(weights: Buffer, spec: BaseModelSpec) -> Prefix:
    """The prefix that a prefix encoder gives.

    Args:
        weights: safetensors with `prefix_encoder.embedding.weight` `[prefix_length, columns]`,
            `columns` being `num_layers * 2 * num_kv_heads * head_dim`; or, trained with
            `prefix_projection`, `[prefix_length, hidden]` and the two linear layers
            `prefix_encoder.trans.0` and `.2` with a tanh between. The names may all begin with the
            name of the module that holds the encoder, as `transformer.` in ChatGLM's.
        spec: the base model it is for.

    Raises:
        InvalidPrefixError: other tensors than these, or not a valid prefix.
        IncompatiblePrefixError: not the sizes of `spec`.
    """
    names = tensor_names(weights)
    holder = next(name for name in names if name.endswith(_EMBEDDING)).removesuffix(_EMBEDDING)
    wanted = (_EMBEDDING, *_PROJECTION) if holder + _PROJECTION[0] in names else (_EMBEDDING,)
    if names != {holder + name for name in wanted}:
        raise InvalidPrefixError(
            f"the file holds {len(names)} tensors; expected {' and '.join(wanted)} alone. Save the "
            "prefix encoder without the model around it."
        )
    tensors, _ = read_tensor_file(weights, names)
    matrix, *projection = (tensors[holder + name] for name in wanted)
    if projection:
        for name, tensor in zip(_PROJECTION, projection, strict=True):
            check_tensor(name, tensor, ndim=2 if name.endswith("weight") else 1)
        check_tensor(_EMBEDDING, matrix, ndim=2)
        matrix = _projected(matrix, projection, spec)
    keys, values = split_keys_and_values(_EMBEDDING, matrix, spec)
    return Prefix.of(keys, values, method=METHOD)


def _projected(
    embedding: torch.Tensor, projection: list[torch.Tensor], spec: BaseModelSpec
) -> torch.Tensor:
    """The encoder's output, float32 `[prefix_length, columns]`."""
    embedding, first, first_bias, second, second_bias = (
        tensor.float() for tensor in (embedding, *projection)
    )
    shapes = [tuple(t.shape) for t in (first, first_bias, second, second_bias)]
    inner, hidden, columns = len(first), embedding.shape[1], num_columns(spec)
    expected = [(inner, hidden), (inner,), (columns, inner), (columns,)]
    if shapes != expected:
        raise IncompatiblePrefixError(
            f"{', '.join(_PROJECTION)} have shapes {shapes}; expected {expected} beside "
            f"{_EMBEDDING} {list(embedding.shape)} for the base model {spec.name!r}"
        )
    linear = torch.nn.functional.linear
    return linear(linear(embedding, first, first_bias).tanh(), second, second_bias)
