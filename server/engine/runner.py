"""Forward passes of the model over the slots."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch
from torch.nn.utils.rnn import pad_sequence

from prefix_store.errors import ModelLoadError
from prefix_store.model_loading import LoadedModel
from server.engine.kv_cache import SlotCache, Window
from server.engine.scheduler import PrefillChunk
from server.engine.sequence import Sequence


class ModelRunner:
    """Any decoder-only transformers model that keeps its keys and values in a standard `Cache`.

    Rows of a batch may have any length: each token's position is given to the model, and an
    additive mask lets it see the positions of its own slot up to its own.
    """

    def __init__(self, loaded: LoadedModel, max_slots: int, max_length: int) -> None:
        check_attention_is_full(loaded, max_length)
        self._model = loaded.model
        self._device = loaded.model.device
        self._dtype = loaded.model.dtype
        self.cache = SlotCache(loaded.spec, max_slots, max_length, self._device, self._dtype)
        self._positions = torch.arange(max_length, device=self._device)

    def prefill(self, chunks: Rows[PrefillChunk]) -> torch.Tensor:
        """Compute prompt chunks together; float32 logits `[chunks, vocab]` after each one's end.

        Rows are padded on the left, so that every row's last token is the batch's last column.
        """
        input_ids = self._left_padded([list(chunk.token_ids) for chunk in chunks], 0)
        spans = [list(range(c.start, c.start + len(c.token_ids))) for c in chunks]
        rows = torch.tensor([chunk.sequence.slot for chunk in chunks], device=self._device)
        window = Window(
            rows=rows,
            write_at=self._left_padded(spans, self.cache.scratch),
            length=max(span[-1] for span in spans) + 1,
        )
        return self._forward(input_ids, self._left_padded(spans, 0), window)

    def decode(self, sequences: Rows[Sequence]) -> torch.Tensor:
        """One token for the sequences of slots 0 .. n - 1; float32 logits `[n, vocab]`.

        Rows whose prompt is not complete go along without effect; their logits mean nothing.
        """
        tokens, positions, write_at = [], [], []
        for sequence in sequences:
            active = sequence.is_decoding
            tokens.append(sequence.output_ids[-1] if active else 0)
            positions.append(sequence.length if active else 0)
            write_at.append(sequence.length if active else self.cache.scratch)
        window = Window(
            rows=slice(0, len(tokens)),
            write_at=self._column(write_at),
            length=max(positions) + 1,
        )
        return self._forward(self._column(tokens), self._column(positions), window)

    def _forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, window: Window
    ) -> torch.Tensor:
        visible = self._positions[: window.length] <= positions[:, None, :, None]
        mask = torch.zeros(visible.shape, dtype=self._dtype, device=self._device)
        mask.masked_fill_(~visible, torch.finfo(self._dtype).min)
        self.cache.select(window)
        output = self._model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits

    def _column(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, device=self._device)[:, None]

    def _left_padded(self, rows: list[list[int]], padding: int) -> torch.Tensor:
        return pad_sequence(
            [torch.tensor(row) for row in rows],
            batch_first=True,
            padding_value=padding,
            padding_side="left",
        ).to(self._device)


def check_attention_is_full(loaded: LoadedModel, max_length: int) -> None:
    """Refuse models with layers that do not attend to every earlier position.

    Raises:
        ModelLoadError: names the layer type or the window, and the length that would work.
    """
    config = loaded.model.config.get_text_config(decoder=True)
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    if layer_types == {"full_attention"} and getattr(config, "layer_types", None):
        window = None
    if window is not None and window < max_length:
        raise ModelLoadError(
            f"{loaded.spec.name!r} attends to the last {window} positions only, fewer than the "
            f"slot length {max_length}; serve it with --max-length {window} or less"
        )
    unsupported = layer_types - {"full_attention", "sliding_attention"}
    if unsupported:
        raise ModelLoadError(
            f"{loaded.spec.name!r} has layers of type {', '.join(sorted(unsupported))}; "
            "only full attention keeps the keys and values that a prefix is made of"
        )
