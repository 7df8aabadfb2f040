"""Where attention reads a prefix, and the keys and values that it reads there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from prefix_store.errors import InvalidPrefixError

Group = Literal["encoder", "decoder", "cross"]
"""The encoder's self-attention, the decoder's self-attention, or the decoder's attention to the
encoder's output; a decoder-only model has the second alone."""

ENCODER: Group = "encoder"
DECODER: Group = "decoder"
CROSS: Group = "cross"
GROUPS: tuple[Group, ...] = (DECODER, ENCODER, CROSS)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class KeysValues:
    """One group's keys and values. Valid, immutable.

    Attributes:
        keys, values: `[num_layers, num_kv_heads, prefix_length, head_dim]`, float16, bfloat16 or
            float32, finite, as the attention uses them (a rotary model's keys are already rotated).
        group: where attention reads them.

    Raises:
        InvalidPrefixError: a tensor is not as above.
    """

    keys: torch.Tensor
    values: torch.Tensor
    group: Group = DECODER

    def __post_init__(self) -> None:
        for name, tensor in self.named().items():
            check_tensor(name, tensor, ndim=4)
        if (self.keys.shape, self.keys.dtype) != (self.values.shape, self.values.dtype):
            keys, values = group_tensors(self.group)
            raise InvalidPrefixError(
                f"{keys} is {_described(self.keys)} and {values} is {_described(self.values)}; "
                "expected the same shape and dtype"
            )

    @property
    def prefix_length(self) -> int:
        """Number of positions."""
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.keys.nbytes + self.values.nbytes

    def named(self) -> dict[str, torch.Tensor]:
        """Both tensors by their names in a file."""
        return dict(zip(group_tensors(self.group), (self.keys, self.values), strict=True))

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> KeysValues:
        """With both tensors changed; itself if nothing changes."""
        keys, values = change(self.keys), change(self.values)
        if keys is self.keys and values is self.values:
            return self
        return replace(self, keys=keys, values=values)


def group_tensors(group: Group) -> tuple[str, str]:
    """What a group's keys and values are called in a file."""
    return f"{group}.keys", f"{group}.values"


def check_tensor(name: str, tensor: torch.Tensor, *, ndim: int) -> None:
    """Refuse a tensor that no prefix can be made of.

    Raises:
        InvalidPrefixError: other than `ndim` dimensions, empty, a dtype not in `DTYPES`, NaN, Inf.
    """
    if tensor.ndim != ndim or tensor.numel() == 0:
        raise InvalidPrefixError(
            f"{name} has shape {list(tensor.shape)}; expected {ndim} dimensions, none of them 0"
        )
    if tensor.dtype not in DTYPES:
        accepted = ", ".join(dtype_name(dtype) for dtype in DTYPES)
        raise InvalidPrefixError(
            f"{name} has dtype {dtype_name(tensor.dtype)}; expected one of {accepted}"
        )
    # Extremes propagate NaN, and finding them takes a tenth of the time of looking at each number.
    if not bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
        kind = "NaN" if bool(torch.isnan(tensor).any()) else "Inf"
        raise InvalidPrefixError(f"{name} holds {kind}; expected finite numbers only")


def _described(tensor: torch.Tensor) -> str:
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as people write it."""
    return str(dtype).removeprefix("torch.")
