"""Small prefixes, and the base model they fit."""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors.torch import save

from prefix_store.artefact import Artefact
from prefix_store.base_model import BaseModelSpec
from prefix_store.groups import DECODER, group_tensors
from prefix_store.prefix import FORMAT, METADATA_KEY, Prefix

KEYS, VALUES = group_tensors(DECODER)
LAYERS, HEADS, LENGTH, HEAD_DIM, EMBEDDING = 2, 3, 5, 4, 24
SHAPE = (LAYERS, HEADS, LENGTH, HEAD_DIM)
SPEC = BaseModelSpec(
    name="org/Base-Model",
    fingerprint="ab" * 32,
    num_layers=LAYERS,
    num_kv_heads=HEADS,
    head_dim=HEAD_DIM,
    embedding_size=EMBEDDING,
    max_positions=64,
)


def a_prefix(seed: int = 0, **fields: Any) -> Prefix:
    """A random prefix that fits `SPEC`; the same seed gives the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(fields.pop("shape", SHAPE), generator=generator)
    values = torch.randn(keys.shape, generator=generator)
    return Prefix.of(**({"keys": keys, "values": values, "method": "test"} | fields))


def an_artefact(seed: int = 0, **fields: Any) -> Artefact:
    """`a_prefix` ready to be stored."""
    return Artefact.of(a_prefix(seed, **fields))


def artefact(
    tensors: dict[str, torch.Tensor] | None = None,
    metadata: dict[str, str] | None = None,
    **fields: Any,
) -> bytes:
    """An artefact written by hand, so that it may be wrong in one place."""
    ones = {KEYS: torch.ones(SHAPE), VALUES: torch.ones(SHAPE)}
    own: dict[str, Any] = {
        "format": FORMAT,
        "method": "test",
        "base_model": "",
        "fingerprint": "",
        "template": "",
        "training": {},
    }
    written = (
        {METADATA_KEY: json.dumps(own | fields, sort_keys=True)} if metadata is None else metadata
    )
    return save(ones if tensors is None else tensors, written)
