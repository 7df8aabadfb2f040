"""Import what Hugging Face PEFT saved.

Every prompt-like type is one matrix, `prompt_embeddings`: an encoder that P_TUNING or a projected
PREFIX_TUNING trained with has been applied when it is saved
(`PeftModel.get_prompt_embedding_to_save`).
"""

from __future__ import annotations

from typing import Any

import torch

from prefix_store.base_model import BaseModelSpec
from prefix_store.errors import IncompatiblePrefixError, InvalidPrefixError
from prefix_store.key_value_matrix import split_keys_and_values
from prefix_store.prefix import Prefix
from prefix_store.soft_prompt import PROMPT_EMBEDDINGS, SoftPrompt
from prefix_store.strict_json import parse_object
from prefix_store.tensor_file import Buffer, read_tensor_file

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 64 * 1024
_KEYS_AND_VALUES = {"PREFIX_TUNING": "prefix-tuning", "CARTRIDGE": "cartridge"}
_EMBEDDINGS = {"PROMPT_TUNING": "prompt-tuning", "P_TUNING": "p-tuning"}
_METHODS = _KEYS_AND_VALUES | _EMBEDDINGS


def from_peft(config_json: Buffer, weights: Buffer, spec: BaseModelSpec) -> Prefix | SoftPrompt:
    """What a PEFT adapter puts in front of the model's input.

    Args:
        config_json: `adapter_config.json`.
        weights: `adapter_model.safetensors`, with `prompt_embeddings`: of PREFIX_TUNING and
            CARTRIDGE `[prefix_length, num_layers * 2 * num_kv_heads * head_dim]`, of PROMPT_TUNING
            and P_TUNING `[prefix_length, embedding_size]`.
        spec: the base model it is for; its sizes say where one layer ends and the next begins.

    Raises:
        InvalidPrefixError: another kind of adapter, or not a valid prefix.
        IncompatiblePrefixError: not the sizes of `spec`.
    """
    config = _config(config_json, spec)
    tensors, _ = read_tensor_file(weights, (PROMPT_EMBEDDINGS,))
    matrix = tensors[PROMPT_EMBEDDINGS]
    kind, base_model = config["peft_type"], config.get("base_model_name_or_path") or ""
    if kind in _EMBEDDINGS:
        _check_config(config, matrix, {"token_dim": spec.embedding_size}, spec)
        return SoftPrompt(matrix, _EMBEDDINGS[kind], base_model)
    _check_config(
        config,
        matrix,
        # PEFT writes the key-value heads here, and their joint size as token_dim.
        {"num_attention_heads": spec.num_kv_heads, "token_dim": spec.num_kv_heads * spec.head_dim},
        spec,
    )
    keys, values = split_keys_and_values(PROMPT_EMBEDDINGS, matrix, spec)
    if spec.encoder is not None:
        # PEFT writes the layers twice, then takes four tensors for each: its own keys and values,
        # and two for attention to the encoder, which it drops (`PeftModel.get_prompt`).
        layers = torch.arange(spec.num_layers) * 2 % spec.num_layers
        keys, values = keys[layers], values[layers]
    return Prefix.of(
        keys,
        values,
        method=_KEYS_AND_VALUES[kind],
        base_model=base_model,
        encoder_decoder=spec.encoder is not None,
    )


def _config(config_json: Buffer, spec: BaseModelSpec) -> dict[str, Any]:
    if len(config_json) > MAX_CONFIG_BYTES:
        raise InvalidPrefixError(
            f"{CONFIG_NAME} is {len(config_json)} bytes; expected at most {MAX_CONFIG_BYTES}"
        )
    config = parse_object(CONFIG_NAME, bytes(config_json))
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in _METHODS:
        raise InvalidPrefixError(
            f"{CONFIG_NAME} has peft_type {str(kind)[:40]!r}; expected one of {', '.join(_METHODS)}"
        )
    expected = "CAUSAL_LM" if spec.encoder is None else "SEQ_2_SEQ_LM"
    if (config.get("num_transformer_submodules") == 2) != (spec.encoder is not None):
        raise IncompatiblePrefixError(
            f"{CONFIG_NAME} has task_type {str(config.get('task_type'))[:40]!r}; expected "
            f"{expected}, as the base model {spec.name!r} is one"
        )
    return config


def _check_config(
    config: dict[str, Any], matrix: torch.Tensor, sizes: dict[str, int], spec: BaseModelSpec
) -> None:
    expected = {"num_layers": spec.num_layers} | sizes
    if matrix.ndim == 2:  # any other is refused for its shape
        expected["num_virtual_tokens"] = len(matrix)
    for name, wanted in expected.items():
        found = config.get(name)
        if found is not None and found != wanted:
            raise IncompatiblePrefixError(
                f"{CONFIG_NAME} has {name} {str(found)[:40]}; expected {wanted}. "
                f"{PROMPT_EMBEDDINGS} has shape {list(matrix.shape)} and the base model "
                f"{spec.name!r} {spec.num_layers} layers of {spec.num_kv_heads} key-value heads of "
                f"{spec.head_dim} numbers and embeddings of {spec.embedding_size}; adapter made "
                f"for {str(config.get('base_model_name_or_path'))[:80]!r}"
            )
