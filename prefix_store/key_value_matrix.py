"""Keys and values that were trained as one matrix, as prefix tuning's implementations do."""

from __future__ import annotations

import torch

from prefix_store.base_model import BaseModelSpec
from prefix_store.errors import IncompatiblePrefixError
from prefix_store.groups import check_tensor


def num_columns(spec: BaseModelSpec) -> int:
    """Numbers per position: every layer's keys and values."""
    return spec.num_layers * 2 * spec.num_kv_heads * spec.head_dim


def split_keys_and_values(
    name: str, matrix: torch.Tensor, spec: BaseModelSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, `[num_layers, num_kv_heads, prefix_length, head_dim]` each.

    Args:
        name: what messages call the matrix.
        matrix: `[prefix_length, num_layers * 2 * num_kv_heads * head_dim]`. The order of its
            columns is layer, key or value, head, number in the head: `PeftModel.get_prompt` and
            P-tuning v2's `get_prompt` show it.

    Raises:
        InvalidPrefixError: no prefix can be made of the tensor.
        IncompatiblePrefixError: not the number of columns that `spec` has.
    """
    check_tensor(name, matrix, ndim=2)
    length, columns = matrix.shape
    if columns != num_columns(spec):
        raise IncompatiblePrefixError(
            f"{name} has shape {[length, columns]}; expected [{length}, {num_columns(spec)}] for "
            f"the base model {spec.name!r}: {spec.num_layers} layers x 2 x {spec.num_kv_heads} "
            f"key-value heads x {spec.head_dim}"
        )
    by_layer = matrix.view(length, spec.num_layers, 2, spec.num_kv_heads, spec.head_dim)
    keys, values = by_layer.permute(2, 1, 3, 0, 4).contiguous()
    return keys, values
