"""Import a prefix that Hugging Face PEFT saved.

PEFT keeps keys and values as one matrix, `prompt_embeddings`; `PeftModel.get_prompt` shows the
order of its columns: layer, key or value, head, number in the head.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from prefix_store.base_model import BaseModelSpec
from prefix_store.errors import IncompatiblePrefixError, InvalidPrefixError
from prefix_store.prefix import Prefix, check_tensor
from prefix_store.tensor_file import Buffer, read_tensor_file

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
TENSOR = "prompt_embeddings"
MAX_CONFIG_BYTES = 64 * 1024
_METHODS = {"PREFIX_TUNING": "prefix-tuning", "CARTRIDGE": "cartridge"}


def from_peft(config_json: bytes, weights: Buffer, spec: BaseModelSpec) -> Prefix:
    """The prefix in a PEFT adapter of type PREFIX_TUNING or CARTRIDGE.

    Args:
        config_json: `adapter_config.json`.
        weights: `adapter_model.safetensors`, with `prompt_embeddings`
            `[prefix_length, num_layers * 2 * num_kv_heads * head_dim]`.
        spec: the base model it is for; its sizes say where one layer ends and the next begins.

    Raises:
        InvalidPrefixError: another kind of adapter, or not a valid prefix.
        IncompatiblePrefixError: not the sizes of `spec`.
    """
    config = _config(config_json)
    tensors, _ = read_tensor_file(weights, (TENSOR,))
    flat = tensors[TENSOR]
    check_tensor(TENSOR, flat, ndim=2)
    _check_sizes(config, flat, spec)
    # [prefix_length, layer, key or value, head, number] -> [key or value, layer, head, position, …]
    by_layer = flat.view(len(flat), spec.num_layers, 2, spec.num_kv_heads, spec.head_dim)
    keys, values = by_layer.permute(2, 1, 3, 0, 4).contiguous()
    return Prefix(
        keys,
        values,
        method=_METHODS[config["peft_type"]],
        base_model=config.get("base_model_name_or_path") or "",
    )


def _config(config_json: bytes) -> dict[str, Any]:
    if len(config_json) > MAX_CONFIG_BYTES:
        raise InvalidPrefixError(
            f"{CONFIG_NAME} is {len(config_json)} bytes; expected at most {MAX_CONFIG_BYTES}"
        )
    try:
        config = json.loads(config_json)
    except (ValueError, RecursionError) as error:
        raise InvalidPrefixError(f"{CONFIG_NAME} is not JSON") from error
    if not isinstance(config, dict):
        raise InvalidPrefixError(f"{CONFIG_NAME} is not a JSON object")
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in _METHODS:
        raise InvalidPrefixError(
            f"{CONFIG_NAME} has peft_type {str(kind)[:40]!r}; expected {' or '.join(_METHODS)}"
        )
    if config.get("num_transformer_submodules") not in (None, 1):
        raise InvalidPrefixError(
            f"{CONFIG_NAME} is for an encoder-decoder model (task_type "
            f"{str(config.get('task_type'))[:40]!r}); expected CAUSAL_LM"
        )
    return config


def _check_sizes(config: dict[str, Any], flat: torch.Tensor, spec: BaseModelSpec) -> None:
    token_dim = spec.num_kv_heads * spec.head_dim
    for name, expected in (
        ("num_layers", spec.num_layers),
        # PEFT writes the key-value heads here, and their joint size as token_dim.
        ("num_attention_heads", spec.num_kv_heads),
        ("token_dim", token_dim),
        ("num_virtual_tokens", len(flat)),
    ):
        found = config.get(name)
        if found is not None and found != expected:
            raise IncompatiblePrefixError(
                f"{CONFIG_NAME} has {name} {str(found)[:40]}; expected {expected}. {TENSOR} has "
                f"shape {list(flat.shape)} and the base model {spec.name!r} "
                f"{spec.num_layers} layers of {spec.num_kv_heads} key-value heads of "
                f"{spec.head_dim} numbers; adapter made for "
                f"{str(config.get('base_model_name_or_path'))[:80]!r}"
            )
    columns = spec.num_layers * 2 * token_dim
    if flat.shape[1] != columns:
        raise IncompatiblePrefixError(
            f"{TENSOR} has shape {list(flat.shape)}; expected [{len(flat)}, {columns}] for the "
            f"base model {spec.name!r}: {spec.num_layers} layers x 2 x {spec.num_kv_heads} "
            f"key-value heads x {spec.head_dim}"
        )
