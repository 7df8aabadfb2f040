"""A position for each row of a batch, in decoders that take the same for all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prefix_store.errors import ModelLoadError
from prefix_store.model_loading import LoadedModel


class DecoderPositions:
    """Positions of an encoder-decoder model's decoder: embedded, or a relative bias.

    BART's decoder embeds positions that it counts itself: they are replaced on their way into its
    `embed_positions`. T5 adds a bias for each distance: it is looked up here, and goes to attention
    in place of the model's.
    """

    def __init__(self, loaded: LoadedModel, max_length: int) -> None:
        """
        Raises:
            ModelLoadError: the decoder has neither.
        """
        model: Any = loaded.model  # whose getters have no types
        decoder = model.get_decoder()
        self._given: Tensor | None = None
        self._by_distance: Tensor | None = None
        embed = getattr(decoder, "embed_positions", None)
        if isinstance(embed, nn.Module):
            embed.register_forward_pre_hook(self._replace, with_kwargs=True)
            embed.register_forward_hook(self._shape)
            return
        biased = [m for m in decoder.modules() if getattr(m, "has_relative_attention_bias", False)]
        if len(biased) != 1:
            raise ModelLoadError(
                f"{loaded.spec.name!r}, a {type(loaded.model).__name__}, has neither position "
                "embeddings nor a relative position bias in its decoder; expected a model built "
                "like BART or T5"
            )
        with torch.inference_mode():
            # Of the last position: towards itself comes last.
            bias = biased[0].compute_bias(1, max_length, past_seen_tokens=max_length - 1)
        self._by_distance = bias[0, :, 0].flip(-1).to(loaded.model.device)

    @contextmanager
    def given(self, positions: Tensor) -> Iterator[None]:
        """Within it the decoder's tokens are at `positions`, int64 `[batch, 1]`."""
        self._given = positions
        try:
            yield
        finally:
            self._given = None

    def bias(self, positions: Tensor, length: int) -> Tensor | None:
        """The relative bias of queries at `positions`, `[batch, 1]`, towards keys 0 .. length - 1.

        `[batch, num_heads, 1, length]`; None where positions are embedded.
        """
        if self._by_distance is None:
            return None
        keys = torch.arange(length, device=positions.device)
        distances = (positions - keys).clamp_(min=0)  # what comes later is masked
        return self._by_distance[:, distances].transpose(0, 1)[:, :, None]

    def _replace(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._given is None:
            return None
        return args, kwargs | {"position_ids": self._given.flatten()}

    def _shape(self, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return None if self._given is None else output.view(*self._given.shape, -1)
