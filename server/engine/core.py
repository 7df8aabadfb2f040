"""One step of continuous batching: admit, compute, choose, finish."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch

from server.engine.protocol import (
    EngineConfig,
    EngineFailedError,
    EngineStats,
    FinishReason,
    StepStats,
    TokenEvent,
)
from server.engine.runner import Runner
from server.engine.sampling import Sample, sample
from server.engine.scheduler import Scheduler, Span
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
    """Owns the slots and their sequences. Not thread-safe: one thread calls everything here.

    A step computes the next token of every sequence whose prompt is complete, and the next chunks
    of the prompts that are not, in one call of the runner.
    """

    def __init__(self, runner: Runner, config: EngineConfig, eos_token_ids: frozenset[int]) -> None:
        self._scheduler = Scheduler(config.max_slots, config.prefill_tokens)
        self._runner = runner
        self._eos_token_ids = eos_token_ids
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
        spans: list[Span] = []
        try:
            for sequence in self._scheduler.admit():
                self._runner.start(sequence)
            spans = self._scheduler.plan()
            events = self._compute(spans) if spans else []
        except Exception:
            logger.exception("a step failed; the requests that were running are answered with it")
            events = self._fail_running("the model failed on this batch; try again")
        seconds = time.perf_counter() - started
        return StepResult(events, _step_stats(spans, seconds, self.stats))

    def _compute(self, spans: Rows[Span]) -> list[Event]:
        """Run the model over `spans`; the events of those whose next token it gives."""
        ending = [i for i, span in enumerate(spans) if span.completes_prompt]
        logits = self._runner.forward(spans)
        for span in spans:
            span.sequence.length = span.end
        if not ending:
            return []
        sequences = [spans[i].sequence for i in ending]
        samples = sample(logits if len(ending) == len(spans) else logits[ending], sequences)
        return [
            self._advance(sequence, chosen)
            for sequence, chosen in zip(sequences, samples, strict=True)
        ]

    def _advance(self, sequence: Sequence, chosen: Sample | None) -> Event:
        if chosen is None:
            self._runner.clear(sequence.slot)
            return self._fail(
                sequence, "the model's output holds NaN or infinity with this task's prefix"
            )
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
        sampling = sequence.request.sampling
        if sequence.output_ids[-1] in self._eos_token_ids and not sampling.ignore_eos:
            return FinishReason.EOS_TOKEN
        if len(sequence.output_ids) == sampling.max_new_tokens:
            return FinishReason.LENGTH
        return None

    def _fail_running(self, reason: str) -> list[Event]:
        running = list(self._scheduler.running)
        for sequence in running:
            self._runner.clear(sequence.slot)
        return [self._fail(sequence, reason) for sequence in reversed(running)]

    def _fail(self, sequence: Sequence, reason: str) -> Event:
        self._remove(sequence)
        return sequence.request.request_id, EngineFailedError(reason)

    def _remove(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request.request_id]
        move = self._scheduler.remove(sequence)
        if move is not None:
            self._runner.move(move)
        assert sequence.slot == NO_SLOT  # noqa: S101 - a slot has one owner


def _step_stats(spans: Rows[Span], seconds: float, stats: EngineStats) -> StepStats:
    decoding = [span for span in spans if span.start >= span.sequence.prompt_end]
    prefilled = sum(span.num_tokens for span in spans) - len(decoding)
    return StepStats(len(decoding), prefilled, seconds, stats)
