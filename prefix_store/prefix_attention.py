"""Attention that puts a prefix in front of every row's keys and values.

A model that takes `past_key_values` reads a prefix of its decoder from there. An encoder takes
none, and attention to the encoder's output replaces what it finds there; for these, the prefix goes
in where every attention of every transformers model passes: through its `AttentionInterface`
(https://huggingface.co/docs/transformers/attention_interface).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from prefix_store.base_model import BaseModelSpec
from prefix_store.errors import ModelLoadError
from prefix_store.groups import CROSS, DECODER, ENCODER, Group

ATTENTION = "prefix"
_PLACE = "prefix_place"
_Place = tuple[Group, int]


@dataclass(frozen=True, slots=True, eq=False)
class RowPrefixes:
    """The prefixes of a batch's rows in one group, padded to the longest.

    Attributes:
        keys, values: `[num_layers, batch, num_heads, length, head_dim]`.
        mask: added to the scores, `[batch, 1, 1, length]`; None where all rows have one length.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPrefixes:
    """What one forward pass is given as `prefixes`.

    Attributes:
        groups: prefixes to put in front; absent where attention is to be as the model has it.
        decoder_bias: replaces a relative position bias of the decoder's self-attention (T5's),
            `[batch, num_heads, queries, keys]`.
    """

    groups: Mapping[Group, RowPrefixes] = field(default_factory=dict)
    decoder_bias: Tensor | None = None


def prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    prefixes: AttentionPrefixes | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention, as transformers calls it; see its `AttentionInterface`.

    A relative position bias is zero towards the prefix of an encoder, which has no position.

    Args:
        query: `[batch, num_heads, queries, head_dim]`.
        key, value: `[batch, num_heads, keys, head_dim]`.
        attention_mask: added to the scores, `[batch, 1, queries or 1, keys]`; None to see all.
        position_bias: added too, `[1, num_heads, queries, keys]`.
    """
    if prefixes is not None:
        group, layer = place_of(module)
        if group == DECODER and prefixes.decoder_bias is not None:
            position_bias = prefixes.decoder_bias
        rows = prefixes.groups.get(group)
        if rows is not None:
            length, own = rows.keys.shape[-2], key.shape[-2]
            attention_mask = _in_front(rows.mask, attention_mask, query, length, own)
            key = torch.cat([rows.keys[layer], key], dim=-2)
            value = torch.cat([rows.values[layer], value], dim=-2)
            if position_bias is not None:
                position_bias = nn.functional.pad(position_bias, (length, 0))
    if position_bias is not None:
        attention_mask = position_bias if attention_mask is None else attention_mask + position_bias
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return output.transpose(1, 2).contiguous(), None


def _in_front(
    mask: Tensor | None, attention_mask: Tensor | None, query: Tensor, length: int, own: int
) -> Tensor | None:
    """The mask for the prefix's `length` positions, then for the model's `own`."""
    if mask is None and attention_mask is None:
        return None
    batch = len(query)
    if mask is None:
        mask = query.new_zeros(batch, 1, 1, length)
    if attention_mask is None:
        attention_mask = query.new_zeros(batch, 1, 1, own)
    queries = attention_mask.shape[-2]
    return torch.cat([mask.expand(batch, 1, queries, length), attention_mask], dim=-1)


def use_prefix_attention(model: PreTrainedModel, spec: BaseModelSpec) -> None:
    """Have an encoder-decoder model attend by `prefix_attention`; without `prefixes` as before.

    Raises:
        ModelLoadError: its attention is not built as BART's or T5's.
    """
    places: dict[Group, list[nn.Module]] = {ENCODER: [], DECODER: [], CROSS: []}
    parts: Any = model  # whose getters have no types
    for part in (parts.get_encoder(), parts.get_decoder()):
        for module in part.modules():
            if hasattr(module, "is_causal") and hasattr(module, "is_decoder"):
                places[_group_of(module)].append(module)
    for group, modules in places.items():
        if len(modules) != spec.shape(group, 0)[0]:
            raise ModelLoadError(
                f"{spec.name!r}, a {type(model).__name__}, has {len(modules)} attentions of the "
                f"kind {group} where {spec.shape(group, 0)[0]} layers are; expected a model built "
                "like BART or T5"
            )
        for layer, module in enumerate(modules):
            setattr(module, _PLACE, (group, layer))
    set_attention(model, ATTENTION)


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Have every part of an encoder-decoder model attend by the registered function `name`."""
    parts: Any = model
    for part in (parts, parts.get_encoder(), parts.get_decoder()):
        part.set_attn_implementation(name)  # T5's halves have configs of their own


def place_of(module: nn.Module) -> _Place:
    """The group and the layer of an attention of a model that uses `prefix_attention`."""
    place: _Place = getattr(module, _PLACE)
    return place


def _group_of(module: nn.Module) -> Group:
    if not module.is_decoder:
        return ENCODER
    return DECODER if module.is_causal else CROSS


AttentionInterface.register(ATTENTION, prefix_attention)
AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
