"""What of a base model takes memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from prefix_store.model_loading import load_skeleton


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Sizes of a base model in one dtype, bytes unless said otherwise.

    Attributes:
        parameters: numbers in its weights; a matrix that is used twice counts once.
        number_bytes: of one number.
        position_bytes: keys and values of one position of a slot, over all layers; with an encoder,
            of one position of the decoder and one of the source.
        prefix_position_bytes: one position of a prefix, in every group the model has.
        max_positions: longest sequence that it has positions for.
    """

    name: str
    parameters: int
    number_bytes: int
    position_bytes: int
    prefix_position_bytes: int
    max_positions: int

    @property
    def weight_bytes(self) -> int:
        """One copy of the weights."""
        return self.parameters * self.number_bytes


def model_size(name: str, *, dtype: torch.dtype, cache_dir: Path) -> ModelSize:
    """Sizes of the model called `name`, as `prefixserve serve --model` names it; reads its config.

    Raises:
        ModelLoadError: there is no such model.
    """
    skeleton = load_skeleton(name, dtype=dtype, cache_dir=cache_dir)
    spec, per_number = skeleton.spec, dtype.itemsize
    prefix = sum(math.prod(spec.shape(group, 1)) for group in spec.groups)
    memories = 1 if spec.encoder is None else 2  # what the decoder said, and what it reads
    own = spec.num_layers * spec.num_kv_heads * spec.head_dim
    return ModelSize(
        name=name,
        parameters=sum(parameter.numel() for parameter in skeleton.model.parameters()),
        number_bytes=per_number,
        position_bytes=2 * memories * own * per_number,
        prefix_position_bytes=2 * prefix * per_number,
        max_positions=spec.max_positions,
    )
