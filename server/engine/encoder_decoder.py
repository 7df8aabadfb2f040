"""Forward passes of an encoder-decoder model over the slots."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import EncoderDecoderCache

from prefix_store.groups import CROSS, DECODER, ENCODER
from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix
from prefix_store.prefix_attention import AttentionPrefixes, RowPrefixes
from server.engine.beam_search import Reordering
from server.engine.decoder_positions import DecoderPositions
from server.engine.grouping import like_lengths
from server.engine.kv_cache import CrossCache, SlotCache, Window
from server.engine.runner import additive_mask, single_tokens
from server.engine.scheduler import SlotMove, Span
from server.engine.sequence import Sequence

_GROUP_TOKENS = 4096
"""Most source tokens, padding included, in one pass of the encoder."""


class EncoderDecoderRunner:
    """Any transformers model built like BART or T5.

    A slot has two memories: the decoder's own keys and values, the prefix first, as in a
    decoder-only model; and those of the encoder's output, the cross prefix first, written once.
    A prefix in the encoder goes into its attention (`prefix_attention`).
    """

    def __init__(self, loaded: LoadedModel, max_slots: int, max_length: int) -> None:
        """
        Args:
            max_length: most positions in each memory of a slot.

        Raises:
            ModelLoadError: its decoder cannot be given positions.
        """
        self._model: Any = loaded.model
        self._encoder = self._model.get_encoder()
        self._device = loaded.model.device
        self._dtype = loaded.model.dtype
        spec, device, dtype = loaded.spec, self._device, self._dtype
        self._own = SlotCache(spec, max_slots, max_length, device, dtype)
        self._cross = CrossCache(spec, max_slots, max_length, device, dtype)
        self._cross_lengths = [0] * max_slots
        self._positions = DecoderPositions(loaded, max_length)
        self._hidden_size = spec.embedding_size

    def start(self, sequence: Sequence) -> None:
        """See `Runner.start`: the prefix is copied into the slot."""
        prefix = sequence.prefix
        self._cross_lengths[sequence.slot] = sequence.prefix_length_in(CROSS)
        if prefix is None:
            return
        for group, memory in ((DECODER, self._own), (CROSS, self._cross)):
            if group in prefix.groups:
                memory.write_prefix(sequence.slot, prefix.groups[group])

    def move(self, move: SlotMove) -> None:
        """See `Runner.move`."""
        self._own.move(move.source, move.target, move.length)
        length = self._cross_lengths[move.source]
        self._cross.move(move.source, move.target, length)
        self._cross_lengths[move.target] = length

    def reorder(self, reordering: Reordering) -> None:
        """See `Runner.reorder`: beams read one source, which each slot is given once."""
        self._own.reorder(reordering)
        for source, target in zip(reordering.sources, reordering.targets, strict=True):
            length = self._cross_lengths[source]
            if self._cross_lengths[target] != length:
                self._cross.move(source, target, length)
                self._cross_lengths[target] = length

    def clear(self, slot: int) -> None:
        """See `Runner.clear`: what is masked is still multiplied, and 0 x NaN is NaN."""
        self._own.clear(slot)
        self._cross.clear(slot)

    def forward(self, spans: Rows[Span]) -> Tensor:
        """See `Runner.forward`: every span is one token, the first after its source is read."""
        first = [i for i, span in enumerate(spans) if span.source_ids]
        later = [i for i, span in enumerate(spans) if not span.source_ids]
        order, parts = [], []
        for group in like_lengths(first, lambda i: len(spans[i].source_ids), _GROUP_TOKENS):
            order.extend(group)
            parts.append(self._first([spans[i] for i in group]))
        if later:
            order.extend(later)
            parts.append(self._later([spans[i] for i in later]))
        return torch.cat(parts)[torch.tensor(order, device=self._device).argsort()]

    def _first(self, spans: Rows[Span]) -> Tensor:
        """Read the sources, and decode the token that each text starts from."""
        sequences = [span.sequence for span in spans]
        hidden = self._encode(sequences)
        fronts = [self._cross_lengths[sequence.slot] for sequence in sequences]
        lengths = [len(sequence.source_ids) for sequence in sequences]
        for sequence, length in zip(sequences, lengths, strict=True):
            self._cross_lengths[sequence.slot] += length
        write_at = [
            [*range(front, front + length), *[self._cross.scratch] * (hidden.shape[1] - length)]
            for front, length in zip(fronts, lengths, strict=True)
        ]
        rows = torch.tensor([sequence.slot for sequence in sequences], device=self._device)
        positions = [span.start for span in spans]
        return self._decode(
            rows,
            [span.token_ids[0] for span in spans],
            positions,
            positions,
            cross_write_at=torch.tensor(write_at, device=self._device),
            hidden=hidden,
        )

    def _encode(self, sequences: Rows[Sequence]) -> Tensor:
        """The encoder's output, `[rows, longest source, hidden_size]`, padded on the right."""
        sources = [torch.tensor(sequence.source_ids) for sequence in sequences]
        input_ids = pad_sequence(sources, batch_first=True).to(self._device)
        lengths = torch.tensor([len(source) for source in sources], device=self._device)
        is_source = torch.arange(input_ids.shape[1], device=self._device) < lengths[:, None]
        prefixes = [sequence.prefix for sequence in sequences]
        hidden: Tensor = self._encoder(
            input_ids=input_ids,
            attention_mask=self._additive(is_source),
            prefixes=AttentionPrefixes({ENCODER: rows} if (rows := self._rows(prefixes)) else {}),
        ).last_hidden_state
        return hidden

    def _rows(self, prefixes: Rows[Prefix | None]) -> RowPrefixes | None:
        """The rows' prefixes in the encoder; None where no row has one."""
        groups = [prefix and prefix.groups.get(ENCODER) for prefix in prefixes]
        longest = max((group.prefix_length for group in groups if group), default=0)
        if longest == 0:
            return None
        layers, heads, _, size = next(group.keys.shape for group in groups if group)
        keys, values = torch.zeros(
            2, layers, len(groups), heads, longest, size, device=self._device, dtype=self._dtype
        )
        for row, group in enumerate(groups):
            if group:
                keys[:, row, :, : group.prefix_length] = group.keys
                values[:, row, :, : group.prefix_length] = group.values
        lengths = torch.tensor(
            [group.prefix_length if group else 0 for group in groups], device=self._device
        )
        is_prefix = torch.arange(longest, device=self._device) < lengths[:, None]
        return RowPrefixes(keys, values, self._additive(is_prefix))

    def _later(self, spans: Rows[Span]) -> Tensor:
        """One token of slots 0 .. n - 1, which cover the spans and are read without a copy.

        Slots in that range without a span go along: they write to scratch, and nobody reads their
        logits.
        """
        tokens, positions, write_at = single_tokens(spans, self._own.scratch)
        logits = self._decode(slice(0, len(tokens)), tokens, positions, write_at)
        return logits[[span.sequence.slot for span in spans]]

    def _decode(
        self,
        rows: slice | Tensor,
        tokens: list[int],
        positions: list[int],
        write_at: list[int],
        *,
        cross_write_at: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """One token of each row; logits `[rows, vocab]`.

        Args:
            rows: slots.
            cross_write_at, hidden: where the encoder's output goes, and it; None if it is there.
        """
        slots = range(rows.start, rows.stop) if isinstance(rows, slice) else rows.tolist()
        cross_lengths = [self._cross_lengths[slot] for slot in slots]
        at, cross_ends = self._column(positions), self._column(cross_lengths)
        own = Window(rows, self._column(write_at), max(positions) + 1)
        nothing = cross_ends if cross_write_at is None else cross_write_at
        cross = Window(rows, nothing, max(1, *cross_lengths))
        self._own.select(own)
        self._cross.select(cross)
        cache = EncoderDecoderCache(self._own, self._cross)
        cache.is_updated = dict.fromkeys(range(len(self._own.keys)), hidden is None)
        if hidden is None:  # only its presence is asked for
            hidden = torch.zeros(
                len(tokens), 1, self._hidden_size, device=self._device, dtype=self._dtype
            )
        columns = torch.arange(max(own.length, cross.length), device=self._device)
        sees_own = columns[: own.length] <= at
        sees_source = columns[: cross.length] < cross_ends
        with self._positions.given(at):
            output = self._model(
                encoder_outputs=(hidden,),
                attention_mask=self._additive(sees_source),
                decoder_input_ids=self._column(tokens),
                decoder_attention_mask=self._additive(sees_own),
                past_key_values=cache,
                use_cache=True,
                prefixes=AttentionPrefixes(decoder_bias=self._positions.bias(at, own.length)),
            )
        logits: Tensor = output.logits[:, -1]
        return logits

    def _additive(self, visible: Tensor) -> Tensor:
        """For every head and query: `visible` is `[rows, keys]`."""
        return additive_mask(visible[:, None, None], self._dtype)

    def _column(self, values: list[int]) -> Tensor:
        return torch.tensor(values, device=self._device)[:, None]
