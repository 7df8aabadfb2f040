"""The layers of a Llama-shaped model as packed, fused matrices for the CPU kernels."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from server.engine.kernels import LANES, MAX_HEAD_DIM, MAX_QUERIES, structures
from server.engine.packed_matrix import PackedMatrix, pack_linears

_STATIC_ROPE = {"default", "linear", "llama3", "yarn"}


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """One decoder layer: projections that share an input are one product."""

    input_norm: torch.Tensor
    qkv: PackedMatrix
    output: PackedMatrix
    mlp_norm: torch.Tensor
    gate_up: PackedMatrix
    down: PackedMatrix

    @property
    def structure(self) -> structures.Layer:
        """What the kernels take; valid while this object lives."""
        return structures.Layer(
            self.input_norm.data_ptr(),
            self.mlp_norm.data_ptr(),
            *(m.structure for m in (self.qkv, self.output, self.gate_up, self.down)),
        )


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
    head: PackedMatrix
    cosine: torch.Tensor
    sine: torch.Tensor
    epsilon: float
    scale: float
    hidden_size: int
    intermediate_size: int
    num_heads: int
    kv_heads: int
    head_dim: int

    @property
    def structure(self) -> structures.Model:
        """What the kernels take; valid while this object lives."""
        layers = (structures.Layer * len(self.layers))(*(layer.structure for layer in self.layers))
        return structures.Model(
            ctypes.cast(layers, ctypes.POINTER(structures.Layer)),
            self.norm.data_ptr(),
            self.cosine.data_ptr(),
            self.sine.data_ptr(),
            len(self.layers),
            self.hidden_size,
            self.num_heads,
            self.kv_heads,
            self.head_dim,
            self.epsilon,
            self.scale,
        )


def pack(model: PreTrainedModel, positions: int, *, int8: bool = False) -> PackedModel | None:
    """Pack a model that is built like Llama; None for any other.

    Structure decides: RMS norms, rotary positions on whole heads, grouped queries, a SiLU gate.
    Whether the result computes the same is for the caller to check, for a config may scale
    something that structure does not show.

    Args:
        positions: how many the rotary tables cover.
        int8: quantise every matrix to 8 bits.
    """
    decoder = getattr(model, "model", None)
    if decoder is None or not _is_llama_shaped(decoder):
        return None
    attention, mlp = decoder.layers[0].self_attn, decoder.layers[0].mlp
    head_dim = attention.head_dim
    num_heads = attention.q_proj.out_features // head_dim
    kv_heads = attention.k_proj.out_features // head_dim
    where = torch.arange(positions, device=model.device)[None]
    cosine, sine = decoder.rotary_emb(torch.zeros(1, device=model.device), where)
    fits = head_dim <= MAX_HEAD_DIM and head_dim % LANES == 0
    fits = fits and num_heads // kv_heads <= MAX_QUERIES and cosine.shape[-1] == head_dim
    # Rows are read two bfloat16 at a time.
    if not fits or model.config.hidden_size % 2 or mlp.gate_proj.out_features % 2:
        return None
    return PackedModel(
        embedding=decoder.embed_tokens.weight,
        layers=tuple(_pack_layer(layer, int8=int8) for layer in decoder.layers),
        norm=decoder.norm.weight,
        head=pack_linears(
            [model.get_output_embeddings()],  # type: ignore[no-untyped-call]
            int8=int8,
        ),
        cosine=cosine[0].float().contiguous(),
        sine=sine[0].float().contiguous(),
        epsilon=decoder.norm.variance_epsilon,
        scale=attention.scaling,
        hidden_size=model.config.hidden_size,
        intermediate_size=mlp.gate_proj.out_features,
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


def _pack_layer(layer: Any, *, int8: bool) -> PackedLayer:
    attention, mlp = layer.self_attn, layer.mlp
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    return PackedLayer(
        input_norm=layer.input_layernorm.weight,
        qkv=pack_linears(projections, int8=int8),
        output=pack_linears([attention.o_proj], int8=int8),
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=pack_linears([mlp.gate_proj, mlp.up_proj], int8=int8, gated=True),
        down=pack_linears([mlp.down_proj], int8=int8),
    )
