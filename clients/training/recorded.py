"""Keys and values as an encoder-decoder model's attention gets them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from prefix_store.groups import Group
from prefix_store.prefix_attention import ATTENTION, place_of, prefix_attention, set_attention

_RECORDING = "prefix-recording"


@torch.no_grad()
def recorded_keys_values(model: PreTrainedModel, ids: Tensor) -> dict[Group, Tensor]:
    """Of one pass over `ids`, `[1, length]`, as the source and as the output.

    Each group's is float32 `[2, num_layers, num_heads, length, head_dim]`.
    """
    seen: dict[Group, list[Tensor]] = {}

    def record(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        seen.setdefault(place_of(module)[0], []).append(torch.stack([key[0], value[0]]).float())
        return prefix_attention(module, query, key, value, *args, **kwargs)

    AttentionInterface.register(_RECORDING, record)
    AttentionMaskInterface.register(_RECORDING, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    set_attention(model, _RECORDING)
    try:
        model(input_ids=ids, decoder_input_ids=ids, use_cache=False)
    finally:
        set_attention(model, ATTENTION)
    return {group: torch.stack(layers, dim=1) for group, layers in seen.items()}
