"""Forward passes of the model over the slots."""

from __future__ import annotations

import logging
from collections.abc import Sequence as Rows
from typing import Protocol

import torch
from torch.nn.utils.rnn import pad_sequence

from prefix_store.errors import ModelLoadError
from prefix_store.groups import DECODER
from prefix_store.model_loading import LoadedModel
from server.engine.beam_search import Reordering
from server.engine.cuda_graphs import CudaGraphs
from server.engine.grouping import like_lengths
from server.engine.kv_cache import SlotCache, Window
from server.engine.scheduler import SCORED_TOKENS, SlotMove, Span
from server.engine.sequence import Sequence
from server.engine.static_decode import Capture, StaticDecode

logger = logging.getLogger(__name__)


class Runner(Protocol):
    """A model and the KV memory of its slots."""

    def start(self, sequence: Sequence) -> None:
        """A sequence was given its slot."""

    def move(self, move: SlotMove) -> None:
        """Carry out what `Scheduler.remove` asked for."""

    def reorder(self, reordering: Reordering) -> None:
        """Beams of one request follow other beams."""

    def clear(self, slot: int) -> None:
        """A slot may hold NaN; see to it that no later sequence there is disturbed."""

    def forward(self, spans: Rows[Span]) -> torch.Tensor:
        """Compute every span; logits `[rows, vocab]` after the last `num_logits` tokens of each."""


class TransformersRunner:
    """Any decoder-only transformers model that keeps its keys and values in a standard `Cache`.

    Rows of a batch may have any length: each token's position is given to the model, and an
    additive mask lets it see the positions of its own slot up to its own. On CUDA, steps of single
    tokens have fixed shapes and are captured in graphs.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        max_slots: int,
        max_length: int,
        *,
        capture: Capture | None = None,
    ) -> None:
        """
        Args:
            capture: makes steps of fixed shapes faster; None to compute every step as it comes.

        Raises:
            ModelLoadError: the model does not attend to every earlier position.
        """
        check_attention_is_full(loaded, max_length)
        self._model = loaded.model
        self._device = loaded.model.device
        self._dtype = loaded.model.dtype
        self._cache = SlotCache(loaded.spec, max_slots, max_length, self._device, self._dtype)
        self._positions = torch.arange(max_length, device=self._device)
        self._static = capture and self._static_decode(capture, max_slots, max_length)

    def start(self, sequence: Sequence) -> None:
        """See `Runner.start`: the prefix is copied into the slot."""
        if sequence.prefix is not None:
            self._cache.write_prefix(sequence.slot, sequence.prefix.groups[DECODER])

    def move(self, move: SlotMove) -> None:
        """See `Runner.move`."""
        self._cache.move(move.source, move.target, move.length)

    def reorder(self, reordering: Reordering) -> None:
        """See `Runner.reorder`."""
        self._cache.reorder(reordering)

    def clear(self, slot: int) -> None:
        """See `Runner.clear`: what is masked is still multiplied, and 0 x NaN is NaN."""
        self._cache.clear(slot)

    def forward(self, spans: Rows[Span]) -> torch.Tensor:
        """See `Runner.forward`."""
        single = [i for i, span in enumerate(spans) if len(span.token_ids) == 1]
        longer = [i for i, span in enumerate(spans) if len(span.token_ids) > span.num_logits]
        scored = [i for i, span in enumerate(spans) if span.num_logits > 1]
        groups = [group for group in (single, longer) if group]
        groups += like_lengths(scored, lambda i: spans[i].num_logits, SCORED_TOKENS)
        parts = [
            (self._single if group is single else self._padded)([spans[i] for i in group])
            for group in groups
        ]
        if groups in ([single], [longer]):
            return parts[0]
        owners = [i for group in groups for i in group for _ in range(spans[i].num_logits)]
        order = torch.tensor(owners, device=self._device).argsort(stable=True)
        return torch.cat(parts)[order]

    def _single(self, spans: Rows[Span]) -> torch.Tensor:
        """Spans of one token, over the slots 0 .. n - 1 that cover them, read without a copy.

        Slots in that range without a span go along: they write to scratch, and nobody reads their
        logits.
        """
        slots = [span.sequence.slot for span in spans]
        if self._static:
            tokens_of = (span.token_ids[0] for span in spans)
            return self._static(slots, tokens_of, [span.start for span in spans])
        tokens, positions, write_at = single_tokens(spans, self._cache.scratch)
        rows = slice(0, len(tokens))
        window = Window(rows, self._column(write_at), length=max(positions) + 1)
        return self._forward(self._column(tokens), self._column(positions), window)[slots]

    @torch.inference_mode()
    def _static_decode(
        self, capture: Capture, max_slots: int, max_length: int
    ) -> StaticDecode | None:
        try:
            static = StaticDecode(
                self._forward,
                max_slots=max_slots,
                max_length=max_length,
                scratch=self._cache.scratch,
                device=self._device,
                capture=capture,
            )
        except RuntimeError as error:
            logger.warning("decoding without CUDA graphs, they cannot hold this model: %s", error)
            return None
        logger.info("captured decode steps of %d shapes", len(static.shapes))
        return static

    def _padded(self, spans: Rows[Span]) -> torch.Tensor:
        """Longer spans, padded on the left: the last tokens of each are in the last columns."""
        positions = [list(range(span.start, span.end)) for span in spans]
        window = Window(
            rows=torch.tensor([span.sequence.slot for span in spans], device=self._device),
            write_at=self._left_padded(positions, self._cache.scratch),
            length=max(span.end for span in spans),
        )
        input_ids = self._left_padded([list(span.token_ids) for span in spans], 0)
        counts = [span.num_logits for span in spans]
        logits = self._logits(input_ids, self._left_padded(positions, 0), window, max(counts))
        return torch.cat([row[-count:] for row, count in zip(logits, counts, strict=True)])

    def _forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, window: Window
    ) -> torch.Tensor:
        """Logits `[rows, vocab]` after each row's last token."""
        return self._logits(input_ids, positions, window, 1)[:, -1]

    def _logits(
        self, input_ids: torch.Tensor, positions: torch.Tensor, window: Window, keep: int
    ) -> torch.Tensor:
        """Logits `[rows, keep, vocab]` after each row's last `keep` tokens."""
        visible = self._positions[: window.length] <= positions[:, None, :, None]
        self._cache.select(window)
        output = self._model(
            input_ids=input_ids,
            attention_mask=additive_mask(visible, self._dtype),
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        logits: torch.Tensor = output.logits[:, -keep:]
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


def single_tokens(spans: Rows[Span], scratch: int) -> tuple[list[int], list[int], list[int]]:
    """Token, position and where its key goes, of slots 0 .. n - 1, which cover spans of one token.

    A slot without a span writes to `scratch`.
    """
    count = 1 + max(span.sequence.slot for span in spans)
    tokens, positions, write_at = [0] * count, [0] * count, [scratch] * count
    for span in spans:
        slot = span.sequence.slot
        tokens[slot] = span.token_ids[0]
        positions[slot] = write_at[slot] = span.start
    return tokens, positions, write_at


def additive_mask(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where `visible`, and what no score outweighs elsewhere."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)


def transformers_runner(
    loaded: LoadedModel, max_slots: int, max_length: int, *, cuda_graphs: bool
) -> TransformersRunner:
    """The general runner as it is best on the model's device.

    Raises:
        ModelLoadError: the model does not attend to every earlier position.
    """
    device = loaded.model.device
    capture = CudaGraphs(device) if cuda_graphs and device.type == "cuda" else None
    return TransformersRunner(loaded, max_slots, max_length, capture=capture)


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
