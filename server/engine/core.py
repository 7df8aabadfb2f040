"""One step of continuous batching: admit, compute, choose, finish."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace

import torch

from server.engine.beam_search import BeamSearch
from server.engine.checks import NOT_FINITE
from server.engine.grammar import Matcher
from server.engine.processors import forced
from server.engine.prompt_scores import score_prompt
from server.engine.protocol import (
    EngineConfig,
    EngineFailedError,
    EngineStats,
    FinishReason,
    PromptEvent,
    PromptToken,
    StepStats,
    StreamEvent,
    TokenEvent,
)
from server.engine.runner import Runner
from server.engine.sampling import Sample, sample
from server.engine.scheduler import Scheduler, Span
from server.engine.sequence import NO_SLOT, Sequence
from server.engine.special_tokens import SpecialTokens

logger = logging.getLogger(__name__)

# How long a step waits for those whose next tokens are not known yet.
_PATIENCE_SECONDS = 0.002

Event = tuple[str, StreamEvent | EngineFailedError]
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

    def __init__(self, runner: Runner, config: EngineConfig, special: SpecialTokens) -> None:
        self._scheduler = Scheduler(config.max_slots, config.prefill_tokens)
        self._runner = runner
        self._special = special
        self._sequences: dict[str, Sequence] = {}
        self._searches: dict[str, BeamSearch] = {}

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
        request_id = sequence.request.request_id
        self._sequences[request_id] = sequence
        if sequence.siblings:
            self._searches[request_id] = BeamSearch(sequence, self._special)
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
        preempted = 0
        try:
            preempted = self._admit()
            spans = self._scheduler.plan()
            events = self._compute(spans) if spans else []
        except Exception:
            logger.exception("a step failed; the requests that were running are answered with it")
            events = self._fail_running("the model failed on this batch; try again")
        seconds = time.perf_counter() - started
        self._scheduler.observe(spans, seconds)
        return StepResult(events, _step_stats(spans, preempted, seconds, self.stats))

    def _admit(self) -> int:
        """Start whose turn it is; how many lost their slots for it."""
        admission = self._scheduler.admit()
        for move in admission.moves:
            self._runner.move(move)
        for sequence in admission.sequences:
            self._runner.start(sequence)
        return admission.preempted

    def _compute(self, spans: Rows[Span]) -> list[Event]:
        """Run the model over `spans`; the events of those whose next token it gives."""
        logits = self._runner.forward(spans)
        for span in spans:
            span.sequence.length = span.end
        events, waiting = self._follow_grammars(spans)
        if any(span.is_scored for span in spans):
            counts = [span.num_logits for span in spans]
            chunks = zip(spans, logits.split_with_sizes(counts), strict=True)
            events += self._score((s, rows) for s, rows in chunks if s.sequence not in waiting)
            logits = logits[torch.tensor(counts).cumsum(0) - 1]
        ending = [
            i
            for i, span in enumerate(spans)
            if span.completes_prompt
            and span.sequence.slot != NO_SLOT
            and span.sequence not in waiting
        ]
        alone = [i for i in ending if not spans[i].sequence.is_beam]
        beams = {id(spans[i].sequence): i for i in ending if spans[i].sequence.is_beam}
        if alone:
            sequences = [spans[i].sequence for i in alone]
            own = logits if len(alone) == len(spans) else logits[alone]
            samples = sample(own, sequences, self._special)
            events += map(self._advance, sequences, samples)
        for request_id, search in tuple(self._searches.items()):
            rows = [beams[id(beam)] for beam in search.running if id(beam) in beams]
            if rows:  # it has its prompt, and a slot
                events += self._search(request_id, logits[rows])
        return events

    def _follow_grammars(self, spans: Rows[Span]) -> tuple[list[Event], set[Sequence]]:
        """The end of those whose grammar leads nowhere, and all that choose no token in this step.

        Where it is not known in time what may come next, the rest goes on: such a sequence computes
        the same once more.
        """
        guided = [
            (span, span.sequence.matcher)
            for span in spans
            if span.completes_prompt and span.sequence.matcher is not None
        ]
        Matcher.wait_for([matcher for _, matcher in guided], _PATIENCE_SECONDS)
        events: list[Event] = []
        waiting: set[Sequence] = set()
        for span, matcher in guided:
            sequence = span.sequence
            if not matcher.is_ready:
                sequence.length = span.start
                sequence.is_decoding = span.start >= sequence.prefill_end
                waiting.add(sequence)
            elif matcher.failure is not None:
                waiting.add(sequence)
                self._remove(sequence)
                events.append((sequence.request.request_id, matcher.failure))
        return events, waiting

    def _score(self, chunks: Iterable[tuple[Span, torch.Tensor]]) -> list[Event]:
        """Keep the scores of prompts that ask for them; the events of those that are complete.

        Args:
            chunks: spans, and the logits `[num_logits, vocab]` of each.
        """
        events: list[Event] = []
        for span, logits in chunks:
            sequence = span.sequence
            if not span.is_scored:
                continue
            scores = score_prompt(logits, span)
            if scores is None:
                self._runner.clear(sequence.slot)
                events.append(self._fail(sequence, NOT_FINITE))
                continue
            sequence.prompt_scores += scores
            if span.completes_prompt:
                events.append(self._prompt_event(sequence))
        return events

    def _prompt_event(self, sequence: Sequence) -> Event:
        request = sequence.request
        tokens = (PromptToken(sequence.prompt_ids[0], None), *sequence.prompt_scores)
        reason = None if request.sampling.max_new_tokens else FinishReason.LENGTH
        if reason is not None:
            self._remove(sequence)
        return request.request_id, PromptEvent(tokens, reason, sequence.queue_seconds)

    def _search(self, request_id: str, logits: torch.Tensor) -> list[Event]:
        """A request's next tokens; the best hypothesis' events once the search has ended."""
        leader, search = self._sequences[request_id], self._searches[request_id]
        reordering = search.advance(logits)
        if reordering is None:
            for beam in leader.beams:
                self._runner.clear(beam.slot)
            return [self._fail(leader, NOT_FINITE)]
        if search.best is None:
            if reordering.sources:
                self._runner.reorder(reordering)
            return []
        *earlier, last = search.best
        events = [TokenEvent(one.chosen, one.top) for one in earlier]
        reason = self._finish_reason(leader, last.chosen.token_id, len(search.best))
        events.append(TokenEvent(last.chosen, last.top, reason))
        events[0] = replace(events[0], queue_seconds=_queued(leader))
        self._remove(leader)
        return [(request_id, event) for event in events]

    def _advance(self, sequence: Sequence, chosen: Sample | None) -> Event:
        if chosen is None:
            self._runner.clear(sequence.slot)
            return self._fail(sequence, NOT_FINITE)
        token_id = chosen.chosen.token_id
        if sequence.matcher is not None and forced(sequence, self._special) is None:
            sequence.matcher.advance(token_id)
        sequence.output_ids.append(token_id)
        first = len(sequence.output_ids) == 1
        reason = self._finish_reason(sequence, token_id, len(sequence.output_ids))
        event = TokenEvent(chosen.chosen, chosen.top, reason, _queued(sequence) if first else None)
        if reason is not None:
            self._remove(sequence)
        return sequence.request.request_id, event

    def _finish_reason(
        self, sequence: Sequence, token_id: int, num_tokens: int
    ) -> FinishReason | None:
        """Why a text ends with `token_id`, its last of `num_tokens`; None where it goes on."""
        params, matcher = sequence.request.sampling, sequence.matcher
        at_limit = num_tokens == params.max_new_tokens
        if matcher is not None:
            ended = FinishReason.LENGTH if at_limit else None
            return FinishReason.EOS_TOKEN if matcher.is_complete else ended
        # A model may force the end there, of whatever text: the limit ended that.
        if at_limit and self._special.forced_eos is not None:
            return FinishReason.LENGTH
        if token_id in self._special.eos and not params.ignore_eos:
            return FinishReason.EOS_TOKEN
        return FinishReason.LENGTH if at_limit else None

    def _fail_running(self, reason: str) -> list[Event]:
        running = list(self._scheduler.running)
        for sequence in running:
            self._runner.clear(sequence.slot)
        leaders = [sequence for sequence in running if not sequence.is_sibling]
        return [self._fail(sequence, reason) for sequence in reversed(leaders)]

    def _fail(self, sequence: Sequence, reason: str) -> Event:
        self._remove(sequence)
        return sequence.request.request_id, EngineFailedError(reason)

    def _remove(self, sequence: Sequence) -> None:
        request_id = sequence.request.request_id
        del self._sequences[request_id]
        self._searches.pop(request_id, None)
        for move in self._scheduler.remove(sequence):
            self._runner.move(move)
        assert sequence.slot == NO_SLOT  # noqa: S101 - a slot has one owner


def _queued(sequence: Sequence) -> float | None:
    """What its first token tells of its wait, unless its prompt told it."""
    told = sequence.request.sampling.prompt_logprobs is not None
    return None if told else sequence.queue_seconds


def _step_stats(spans: Rows[Span], preempted: int, seconds: float, stats: EngineStats) -> StepStats:
    decoding = [span for span in spans if span.start >= span.sequence.prefill_end]
    prefilled = sum(span.num_tokens for span in spans) - len(decoding)
    return StepStats(len(decoding), prefilled, preempted, seconds, stats)
