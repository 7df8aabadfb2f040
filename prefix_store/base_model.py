"""What a prefix must fit: the shape and identity of a frozen base model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from operator import itemgetter
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from prefix_store.groups import CROSS, DECODER, ENCODER, Group

FINGERPRINT_SAMPLE = 64
_ALIASES = {"smollm2-135m": "smollm2-135m-instruct"}


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """Shape of the encoder of an encoder-decoder model.

    Attributes:
        num_layers, num_heads, head_dim: as `BaseModelSpec` has them of the decoder.
    """

    num_layers: int
    num_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class BaseModelSpec:
    """Shape and identity of a base model.

    Attributes:
        name: what the operator called it (hub id, alias or path); for people.
        fingerprint: `fingerprint()` of its weights; for machines.
        num_layers, num_kv_heads, head_dim: sizes of a prefix,
            `[num_layers, num_kv_heads, prefix_length, head_dim]`.
        embedding_size: size of a soft prompt's embeddings, `[prefix_length, embedding_size]`.
        max_positions: longest sequence, prefix included, that the model has positions for; with an
            encoder, longest source too.
        encoder: of an encoder-decoder model, whose decoder the sizes above are of.
    """

    name: str
    fingerprint: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    embedding_size: int
    max_positions: int
    encoder: EncoderSpec | None = None

    @classmethod
    def from_model(
        cls, model: PreTrainedModel, name: str, identity: str | None = None
    ) -> BaseModelSpec:
        """Read the sizes off a transformers model.

        Args:
            identity: the fingerprint, for a model that has no weights to take it of.
        """
        identity = fingerprint(model) if identity is None else identity
        if model.config.is_encoder_decoder:
            return _encoder_decoder(model, name, identity)
        config = model.config.get_text_config(decoder=True)
        num_heads = config.num_attention_heads
        return cls(
            name=name,
            fingerprint=identity,
            num_layers=config.num_hidden_layers,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
            embedding_size=cast("nn.Embedding", model.get_input_embeddings()).embedding_dim,
            max_positions=config.max_position_embeddings,
        )

    @property
    def groups(self) -> tuple[Group, ...]:
        """Where it can read a prefix."""
        return (DECODER,) if self.encoder is None else (DECODER, ENCODER, CROSS)

    def shape(self, group: Group, prefix_length: int) -> tuple[int, int, int, int]:
        """`[num_layers, num_kv_heads, prefix_length, head_dim]` of one of `groups`."""
        if group == ENCODER and self.encoder is not None:
            encoder = self.encoder
            return encoder.num_layers, encoder.num_heads, prefix_length, encoder.head_dim
        return self.num_layers, self.num_kv_heads, prefix_length, self.head_dim


_RELATIVE_POSITIONS = 1_000_000
"""Longest text of a model that has no positions of its own to run out of."""


def _encoder_decoder(model: PreTrainedModel, name: str, identity: str) -> BaseModelSpec:
    encoder = model.config.get_text_config(encoder=True)
    decoder = model.config.get_text_config(decoder=True)
    positions = getattr(model.config, "max_position_embeddings", None)
    return BaseModelSpec(
        name=name,
        fingerprint=identity,
        # T5 names its own.
        num_layers=getattr(decoder, "num_decoder_layers", None) or decoder.num_hidden_layers,
        num_kv_heads=decoder.num_attention_heads,
        head_dim=_head_dim(decoder),
        embedding_size=cast("nn.Embedding", model.get_input_embeddings()).embedding_dim,
        max_positions=positions or _RELATIVE_POSITIONS,
        encoder=EncoderSpec(
            encoder.num_hidden_layers, encoder.num_attention_heads, _head_dim(encoder)
        ),
    )


def _head_dim(config: PreTrainedConfig) -> int:
    # T5's is a size of its own.
    size: int = getattr(config, "d_kv", None) or config.hidden_size // config.num_attention_heads
    return size


def fingerprint(model: PreTrainedModel) -> str:
    """`fingerprint_of` a loaded model."""
    return fingerprint_of(
        (name, tuple(parameter.shape), parameter.detach().flatten()[:FINGERPRINT_SAMPLE])
        for name, parameter in model.named_parameters()
    )


def fingerprint_of(parameters: Iterable[tuple[str, tuple[int, ...], torch.Tensor]]) -> str:
    """Hex SHA-256 that tells two base models apart, whatever dtype or device they are loaded on.

    Covers every parameter's name, shape and first values rounded to bfloat16: reading all of a
    large model would take minutes at start-up, and trained models differ everywhere.

    Args:
        parameters: name, shape, and the first `FINGERPRINT_SAMPLE` numbers, in any order.
    """
    digest = hashlib.sha256()
    for name, shape, first in sorted(parameters, key=itemgetter(0)):
        sample = first.to("cpu", torch.bfloat16)
        digest.update(f"{name}{shape}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def same_model_name(one: str, other: str) -> bool:
    """Whether two names (hub ids, aliases, paths) end in the same word, whatever its case."""
    return _last_word(one) == _last_word(other)


def _last_word(name: str) -> str:
    word = name.rstrip("/").lower()
    # Only a bare word is an alias: `HuggingFaceTB/SmolLM2-135M` is a model of its own.
    return _ALIASES.get(word, word.rsplit("/", 1)[-1])
