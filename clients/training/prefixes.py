"""What is trained of a prefix, and where it starts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from clients.training.recorded import recorded_keys_values
from prefix_store.groups import DECODER, Group

_RANDOM_STD = 0.02  # transformers' initializer_range
_BOTTLENECK = 512  # of the paper's table-to-text runs
KEYS_AND_VALUES = 2


class TrainedPrefix(nn.Module):
    """Gives keys and values, float32 `[2, num_layers, num_kv_heads, prefix_length, head_dim]`."""

    @property
    def prefix_length(self) -> int:
        """Positions that it takes."""
        raise NotImplementedError


class DirectPrefix(TrainedPrefix):
    """Keys and values as parameters (Eyuboglu et al. 2025, Cartridges).

    They are counted in units of the spread that keys and values have in each layer and head, which
    differs by orders of magnitude: Adam moves every parameter by the same amount.
    """

    def __init__(self, initial: Tensor, unit: Tensor, *, freeze_first: bool = False) -> None:
        """
        Args:
            initial: keys and values to start from.
            unit: the spread, `[2, num_layers, num_kv_heads, 1, 1]`.
            freeze_first: keep the first position as it is.
        """
        super().__init__()
        self.initial: Tensor
        self.unit: Tensor
        self.register_buffer("initial", initial.clone())
        self.register_buffer("unit", unit.clone())
        self.moved = nn.Parameter(torch.zeros_like(initial[..., int(freeze_first) :, :]))

    @property
    def prefix_length(self) -> int:
        return self.initial.shape[-2]

    def forward(self) -> Tensor:
        frozen = self.prefix_length - self.moved.shape[-2]
        return self.initial + nn.functional.pad(self.unit * self.moved, (0, 0, frozen, 0))


class ReparametrisedPrefix(TrainedPrefix):
    """`P = MLP(P')` (Li & Liang 2021, section 4.3), added to where it starts.

    The MLP's last layer is zero at first, so that training starts exactly at `initial`; the paper
    instead fits the MLP to it beforehand.
    """

    def __init__(
        self, initial: Tensor | None, embeddings: Tensor, shape: tuple[int, int, int, int]
    ) -> None:
        """
        Args:
            initial: keys and values to start from; None for those of an MLP as it is made.
            embeddings: what `P'` starts as, `[prefix_length, any size]`.
            shape: of the keys, `[num_layers, num_kv_heads, prefix_length, head_dim]`.
        """
        super().__init__()
        size = embeddings.shape[1]
        layers, heads, length, head_dim = shape
        self._shape = (length, KEYS_AND_VALUES, layers, heads, head_dim)
        self.embeddings = nn.Parameter(embeddings.float().clone())
        self.inner = nn.Linear(size, _BOTTLENECK)
        self.outer = nn.Linear(_BOTTLENECK, torch.Size(self._shape[1:]).numel())
        if initial is None:
            initial = torch.zeros(KEYS_AND_VALUES, *shape)
        else:
            nn.init.zeros_(self.outer.weight)
            nn.init.zeros_(self.outer.bias)
        self.initial: Tensor
        self.register_buffer("initial", initial.clone())

    @property
    def prefix_length(self) -> int:
        return self._shape[0]

    def forward(self) -> Tensor:
        matrix: Tensor = self.outer(torch.tanh(self.inner(self.embeddings)))
        return self.initial + matrix.view(self._shape).permute(1, 2, 3, 0, 4)


@torch.no_grad()
def text_keys_values(model: PreTrainedModel, token_ids: Sequence[int]) -> dict[Group, Tensor]:
    """Keys and values of a text, float32 `[2, num_layers, num_kv_heads, length, head_dim]`.

    With an encoder they are those of the text as the source, and as the output.
    """
    ids = torch.tensor([list(token_ids)], device=model.device)
    if model.config.is_encoder_decoder:
        return recorded_keys_values(model, ids)
    layers = model(input_ids=ids, use_cache=True).past_key_values.layers
    keys = torch.cat([layer.keys for layer in layers])
    values = torch.cat([layer.values for layer in layers])
    return {DECODER: torch.stack([keys, values]).float()}


def spread(keys_values: Tensor) -> Tensor:
    """Standard deviation in each layer and head, `[2, num_layers, num_kv_heads, 1, 1]`."""
    return keys_values.flatten(3).std(-1)[..., None, None]


def random_keys_values(shape: tuple[int, int, int, int]) -> Tensor:
    """Small random numbers, float32 `[2, *shape]`."""
    return torch.randn(KEYS_AND_VALUES, *shape) * _RANDOM_STD
