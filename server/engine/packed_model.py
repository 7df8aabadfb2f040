"""The layers of a Llama-shaped model as packed, fused matrix products for the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from server.engine.kernels import MAX_HEAD_DIM, MAX_QUERIES

_STATIC_ROPE = {"default", "linear", "llama3", "yarn"}

Linear = Callable[[torch.Tensor], torch.Tensor]
"""`[rows, in]` to `[rows, out]`."""


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """One decoder layer: projections that share an input are one product."""

    input_norm: torch.Tensor
    qkv: Linear
    output: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class PackedModel:
    """What a forward pass needs.

    Attributes:
        cosine, sine: float32 `[positions, head_dim]`, the rotary tables.
        scale: multiplies attention scores.
    """

    embedding: torch.Tensor
    layers: tuple[PackedLayer, ...]
    norm: torch.Tensor
    head: Linear
    cosine: torch.Tensor
    sine: torch.Tensor
    epsilon: float
    scale: float
    hidden_size: int
    intermediate_size: int
    num_heads: int
    kv_heads: int
    head_dim: int


def pack(model: PreTrainedModel, positions: int) -> PackedModel | None:
    """Pack a model that is built like Llama; None for any other.

    Structure decides: RMS norms, rotary positions on whole heads, grouped queries, a SiLU gate.
    Whether the result computes the same is for the caller to check, for a config may scale
    something that structure does not show.
    """
    decoder = getattr(model, "model", None)
    if decoder is None or not _is_llama_shaped(decoder):
        return None
    config = model.config
    attention = decoder.layers[0].self_attn
    head_dim = attention.head_dim
    num_heads = attention.q_proj.out_features // head_dim
    kv_heads = attention.k_proj.out_features // head_dim
    where = torch.arange(positions, device=model.device)[None]
    cosine, sine = decoder.rotary_emb(torch.zeros(1, device=model.device), where)
    fits = head_dim <= MAX_HEAD_DIM and num_heads // kv_heads <= MAX_QUERIES
    if cosine.shape[-1] != head_dim or not fits:
        return None
    return PackedModel(
        embedding=decoder.embed_tokens.weight,
        layers=tuple(_pack_layer(layer) for layer in decoder.layers),
        norm=decoder.norm.weight,
        head=_packed([model.get_output_embeddings()]),  # type: ignore[no-untyped-call]
        cosine=cosine[0].contiguous(),
        sine=sine[0].contiguous(),
        epsilon=decoder.norm.variance_epsilon,
        scale=attention.scaling,
        hidden_size=config.hidden_size,
        intermediate_size=decoder.layers[0].mlp.gate_proj.out_features,
        num_heads=num_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
    )


def _is_llama_shaped(decoder: nn.Module) -> bool:
    if not _has_children(decoder, "embed_tokens", "layers", "norm", "rotary_emb"):
        return False
    layers: list[Any] = list(decoder.layers)  # type: ignore[arg-type]
    rope_type = getattr(decoder.rotary_emb, "rope_type", None)
    if rope_type not in _STATIC_ROPE or not all(map(_is_llama_layer, layers)):
        return False
    norms = [layer.input_layernorm for layer in layers] + [decoder.norm]
    norms += [layer.post_attention_layernorm for layer in layers]
    epsilons = {getattr(norm, "variance_epsilon", None) for norm in norms}
    return len(epsilons) == 1 and None not in epsilons


def _is_llama_layer(layer: Any) -> bool:
    return (
        _has_children(layer, "self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
        and _has_children(layer.self_attn, "q_proj", "k_proj", "v_proj", "o_proj")
        and _has_children(layer.mlp, "gate_proj", "up_proj", "down_proj", "act_fn")
        and type(layer.mlp.act_fn).__name__ in {"SiLU", "SiLUActivation"}
    )


def _has_children(module: nn.Module, *names: str) -> bool:
    return {name for name, _ in module.named_children()} == set(names)


def _pack_layer(layer: Any) -> PackedLayer:
    attention, mlp = layer.self_attn, layer.mlp
    return PackedLayer(
        input_norm=layer.input_layernorm.weight,
        qkv=_packed([attention.q_proj, attention.k_proj, attention.v_proj]),
        output=_packed([attention.o_proj]),
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=_packed([mlp.gate_proj, mlp.up_proj]),
        down=_packed([mlp.down_proj]),
    )


def _packed(linears: list[Any]) -> Linear:
    """One product for linears of the same input, its weights in oneDNN's own layout."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    biases = [linear.bias for linear in linears]
    bias = None
    if any(b is not None for b in biases):
        zeros = [weight.new_zeros(linear.out_features) for linear in linears]
        bias = torch.cat(
            [z if b is None else b.detach() for b, z in zip(biases, zeros, strict=True)]
        )
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    product = torch.ops.mkldnn._linear_pointwise.default

    def linear(rows: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = product(rows, packed, bias, "none", [], "")
        return result

    return linear
