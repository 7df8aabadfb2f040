"""One step of continuous batching: admit, prefill, decode, finish."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch

from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix
from server.engine.protocol import (
    EngineConfig,
    EngineFailedError,
    EngineStats,
    FinishReason,
    StepStats,
    TokenEvent,
)
from server.engine.runner import ModelRunner
from server.engine.sampling import Sample, sample
from server.engine.scheduler import PrefillChunk, Scheduler
from server.engine.sequence import NO_SLOT, Sequence

logger = logging.getLogger(__name__)

Event = tuple[str, TokenEvent | EngineFailedError]
"""A request's id and what happened to it; an error is its last event."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step has to tell: events in order, and figures."""

    events: list[Event]
    stats: StepStats


class EngineCore:
    """Owns the model and the slots. Not thread-safe: one thread calls everything here.

    A step prefills the next chunks of new prompts, then decodes one token for every sequence whose
    prompt is complete, those just completed included.
    """

    def __init__(self, loaded: LoadedModel, config: EngineConfig) -> None:
        self._scheduler = Scheduler(config.max_slots, config.prefill_tokens)
        self._runner = ModelRunner(loaded, config.max_slots, config.max_length)
        self._eos_token_ids = eos_token_ids(loaded)
        self._sequences: dict[str, Sequence] = {}

    @property
    def has_work(self) -> bool:
        """True while any request waits or runs."""
        return self._scheduler.has_work

    @property
    def stats(self) -> EngineStats:
        """A snapshot of the queue and the slots."""
        scheduler = self._scheduler
        return EngineStats(len(scheduler.running), len(scheduler.waiting), scheduler.max_slots)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self._sequences[sequence.request.request_id] = sequence
        self._scheduler.add(sequence)

    def cancel(self, request_id: str) -> None:
        """Free a request's slot at once; unknown ids are ignored."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._remove(sequence)

    @torch.inference_mode()
    def step(self) -> StepResult:
        """Advance every running sequence; a failure ends those that ran, never those that wait."""
        started = time.perf_counter()
        events: list[Event] = []
        prefilled = decoded = 0
        try:
            for sequence in self._scheduler.admit():
                if sequence.prefix is not None:
                    self._runner.cache.write_prefix(sequence.slot, sequence.prefix)
            chunks = self._scheduler.plan_prefill()
            if chunks:
                prefilled = sum(len(chunk.token_ids) for chunk in chunks)
                events += self._prefill(chunks)
            decoding = [s for s in self._scheduler.running if s.is_decoding]
            if decoding:
                decoded = len(decoding)
                events += self._decode()
        except Exception:
            logger.exception("a step failed; the requests that were running are answered with it")
            events += self._fail_running("the model failed on this batch; try again")
        seconds = time.perf_counter() - started
        return StepResult(events, StepStats(decoded, prefilled, seconds, self.stats))

    def fail_all(self, reason: str) -> list[Event]:
        """End every request with an error."""
        failed = list(self._sequences.values())
        return [self._fail(sequence, reason) for sequence in failed]

    def _prefill(self, chunks: Rows[PrefillChunk]) -> list[Event]:
        logits = self._runner.prefill(chunks)
        for chunk in chunks:
            chunk.sequence.length += len(chunk.token_ids)
        rows = [i for i, chunk in enumerate(chunks) if chunk.sequence.is_decoding]
        completed = [chunks[i].sequence for i in rows]
        return self._emit(logits[rows], completed) if completed else []

    def _decode(self) -> list[Event]:
        running = list(self._scheduler.running)
        logits = self._runner.decode(running)
        rows = [i for i, sequence in enumerate(running) if sequence.is_decoding]
        decoding = [running[i] for i in rows]
        for sequence in decoding:
            sequence.length += 1
        return self._emit(logits if len(rows) == len(running) else logits[rows], decoding)

    def _emit(self, logits: torch.Tensor, sequences: Rows[Sequence]) -> list[Event]:
        """The events of `sequences`' next tokens; finished sequences leave their slots."""
        samples = sample(logits, sequences)
        return [
            event
            for sequence, chosen in zip(sequences, samples, strict=True)
            if (event := self._advance(sequence, chosen)) is not None
        ]

    def _advance(self, sequence: Sequence, chosen: Sample | None) -> Event | None:
        if chosen is None:
            self._runner.cache.clear(sequence.slot)
            return self._fail(
                sequence, "the model's output holds NaN or infinity with this task's prefix"
            )
        if sequence.capture is not None:
            if sequence.capture.set_running_or_notify_cancel():
                keys, values = self._runner.cache.read(sequence.slot, sequence.length)
                sequence.capture.set_result(Prefix(keys, values, method="text"))
            self._remove(sequence)
            return None
        sequence.output_ids.append(chosen.chosen.token_id)
        first = len(sequence.output_ids) == 1
        reason = self._finish_reason(sequence)
        event = TokenEvent(
            chosen.chosen, chosen.top, reason, sequence.queue_seconds if first else None
        )
        if reason is not None:
            self._remove(sequence)
        return sequence.request.request_id, event

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        if sequence.output_ids[-1] in self._eos_token_ids:
            return FinishReason.EOS_TOKEN
        if len(sequence.output_ids) == sequence.request.sampling.max_new_tokens:
            return FinishReason.LENGTH
        return None

    def _fail_running(self, reason: str) -> list[Event]:
        running = list(self._scheduler.running)
        for sequence in running:
            self._runner.cache.clear(sequence.slot)
        return [self._fail(sequence, reason) for sequence in reversed(running)]

    def _fail(self, sequence: Sequence, reason: str) -> Event:
        self._remove(sequence)
        error = EngineFailedError(reason)
        if sequence.capture is not None and sequence.capture.set_running_or_notify_cancel():
            sequence.capture.set_exception(error)
        return sequence.request.request_id, error

    def _remove(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request.request_id]
        move = self._scheduler.remove(sequence)
        if move is not None:
            self._runner.cache.move(move.source, move.target, move.length)
        assert sequence.slot == NO_SLOT  # noqa: S101 - a slot has one owner


def eos_token_ids(loaded: LoadedModel) -> frozenset[int]:
    """The tokens that end a text, from the model's generation config."""
    generation_config = loaded.model.generation_config
    ids = generation_config.eos_token_id if generation_config is not None else None
    if ids is None:
        return frozenset()
    return frozenset(ids if isinstance(ids, list) else [ids])
