"""Which sequence has which slot, and what each computes in the next step."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from server.engine.account import OUTPUT_COST
from server.engine.fair_queue import FairQueue
from server.engine.preemption import victims
from server.engine.sequence import NO_SLOT, Sequence
from server.engine.step_cost import StepCost

SCORED_TOKENS = 256
"""Most prompt tokens in one step whose logits are kept: each has one for all of the vocabulary."""

# While others may come, a backlog's prompts make a step by so much of it longer, or have this part
# of the bound. Less of either made nobody wait less, and the whole slower (docs/fairness.md).
_LENGTHENING = 0.3
_LEAST_SHARE = 8


@dataclass(frozen=True, slots=True)
class Span:
    """What a sequence computes in one step: `token_ids` at positions `start`, `start + 1`, ...

    A chunk of what it prefills, or the one token it generated last.
    """

    sequence: Sequence
    start: int
    token_ids: tuple[int, ...]

    @property
    def end(self) -> int:
        """One past its last position."""
        return self.start + len(self.token_ids)

    @property
    def source_ids(self) -> tuple[int, ...]:
        """What the encoder must read before it; nothing after the first."""
        return () if self.start > self.sequence.prefix_length else self.sequence.source_ids

    @property
    def num_tokens(self) -> int:
        """Tokens that it takes to compute, the encoder's too."""
        return len(self.token_ids) + len(self.source_ids)

    @property
    def is_scored(self) -> bool:
        """True for a chunk of a prompt whose log-probabilities are wanted."""
        return self.sequence.is_scored and self.start < self.sequence.prompt_end

    @property
    def num_logits(self) -> int:
        """Of how many of its tokens, the last ones, the logits are wanted."""
        return len(self.token_ids) if self.is_scored else 1

    @property
    def completes_prompt(self) -> bool:
        """True when the sequence's next token can be chosen after this span."""
        return self.end >= self.sequence.prefill_end


@dataclass(frozen=True, slots=True)
class SlotMove:
    """Slot `source`'s first `length` positions belong in slot `target` now."""

    source: int
    target: int
    length: int


@dataclass(frozen=True, slots=True)
class Admission:
    """Carry out `moves` in their order; then `sequences` have slots that are theirs to write to.

    A move may be of one of `sequences`, in whose slot nothing is yet.
    """

    moves: tuple[SlotMove, ...]
    sequences: tuple[Sequence, ...]
    preempted: int


class _PromptBudget:
    """Tokens of prompts that a step may still compute.

    Tenants that have more waiting get only what others leave of a smaller number, where there is
    one. Whoever comes next waits for the end of a step, and with the prompts of a flood every step
    would be as long as it can get.
    """

    def __init__(self, tokens: int, backlogged_tokens: int) -> None:
        self._most = {False: tokens, True: backlogged_tokens}  # by `is_backlogged`
        self._left = dict(self._most)
        self._scored = SCORED_TOKENS

    def take(self, sequence: Sequence, *, is_backlogged: bool) -> Span | None:
        """A sequence's next chunk, if there is room for one.

        A source, which an encoder can only read whole, may be over the bound where it is the first.
        """
        room = min(self._left[False], self._left[is_backlogged])
        # A decoder that reads a source is only ever given one token at a time.
        longest = 1 if sequence.source_ids else room
        if sequence.is_scored:
            longest = min(longest, self._scored)
        if room <= 0 or longest == 0:
            return None
        span = Span(sequence, sequence.length, sequence.uncomputed[:longest])
        if span.source_ids and span.num_tokens > room < self._most[is_backlogged]:
            return None
        self._left = {kind: left - span.num_tokens for kind, left in self._left.items()}
        self._scored -= len(span.token_ids) if sequence.is_scored else 0
        return span


class Scheduler:
    """Gives slots to whose turn it is; slots are always the dense range 0 .. running - 1.

    Turns are those of `FairQueue`: priorities are strict, tenants of one priority are served in
    proportion to their weights, and one tenant's requests are first come, first served. Where it
    is the turn of a tenant below its share of the slots, it does not wait for one: another that is
    over its own gives one up (`preemption`), and computes again what it had there.

    Dense slots let a decode step read the KV memory as one slice, without a gather: when a
    sequence leaves, the last one moves into its place.
    """

    def __init__(
        self, max_slots: int, prefill_tokens: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.max_slots = max_slots
        self.prefill_tokens = prefill_tokens
        self.waiting = FairQueue(clock)
        self.running: list[Sequence] = []  # running[i].slot == i
        self._clock = clock
        self._chunks = itertools.count(1)
        self._cost = StepCost()

    @property
    def has_work(self) -> bool:
        """True while any sequence waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence, sum(one.served for one in self.running))

    def admit(self) -> Admission:
        """Give free slots, and those that others must give up, to the sequences whose turn it is.

        A sequence and its siblings get theirs together; until there are enough, nobody else does.
        """
        moves: list[SlotMove] = []
        admitted: list[Sequence] = []
        preempted = 0
        while self.waiting:
            head = self.waiting.first
            if len(self.running) + len(head.beams) > self.max_slots:
                yielding = victims(head, self.running, self.waiting.accounts, self.max_slots)
                if not yielding:
                    break
                moves += self._preempt(yielding)
                preempted += len(yielding)
            self.waiting.take(head)  # whoever yielded may be first by now
            admitted += self._seat(head)
        seated = tuple(sequence for sequence in admitted if sequence.slot != NO_SLOT)
        return Admission(tuple(moves), seated, preempted)

    def _seat(self, first: Sequence) -> tuple[Sequence, ...]:
        waited = self._clock() - first.queued_at
        for sequence in first.beams:
            sequence.slot = len(self.running)
            sequence.length = sequence.prefix_length
            sequence.queue_seconds += waited
            self.running.append(sequence)
        first.account.slots += len(first.beams)
        return first.beams

    def _preempt(self, sequences: list[Sequence]) -> list[SlotMove]:
        now = self._clock()
        moves = self._vacate_all(sequences)
        for sequence in sorted(sequences, key=lambda s: s.arrived_at, reverse=True):
            sequence.preempt(now)
            self.waiting.put_back(sequence)
        return moves

    def plan(self) -> list[Span]:
        """The next step: one token of every decoding sequence, then prompt chunks.

        At most `prefill_tokens` of the latter: the bound keeps a long prompt from stalling the
        sequences that are decoding. Tenants take turns at it, so that one's long prompts do not
        hold up another's; each one's own are computed in order of arrival.
        """
        spans = []
        for sequence in self.running:
            if sequence.is_decoding:
                sequence.account.charge(OUTPUT_COST)
                spans.append(Span(sequence, sequence.length, (sequence.output_ids[-1],)))
        budget = _PromptBudget(self.prefill_tokens, self._backlogged_tokens(len(spans)))
        prefilling = (s for s in self.running if not s.is_decoding and not s.is_sibling)
        for sequence in sorted(prefilling, key=_prefill_turn):
            span = budget.take(sequence, is_backlogged=self.waiting.has(sequence.account))
            if span is None:
                continue
            spans.append(span)
            sequence.account.last_prefill = next(self._chunks)
            if span.completes_prompt:
                for beam in sequence.beams:
                    beam.is_decoding = True
                    beam.account.charge(OUTPUT_COST)
        return spans

    def observe(self, spans: Iterable[Span], seconds: float) -> None:
        """Learn from a step that took so long."""
        tokens = [span.num_tokens for span in spans]
        decoding = tokens.count(1)
        self._cost.observe(decoding, sum(tokens) - decoding, seconds)

    def _backlogged_tokens(self, decoding: int) -> int:
        """How much of prompts may be computed for those that have more waiting.

        While others may come, no more than makes a step of so many decoding rows a little longer.
        """
        if not self.waiting.expects_others:
            return self.prefill_tokens
        most = self._cost.prompt_tokens(decoding, _LENGTHENING)
        least = max(1, self.prefill_tokens // _LEAST_SHARE)
        return max(least, int(min(most, self.prefill_tokens)))

    def remove(self, sequence: Sequence) -> list[SlotMove]:
        """Take a sequence out of the queue, or it and its siblings out of their slots.

        Returns the moves that keep slots dense, in their order.
        """
        if sequence.slot == NO_SLOT:
            self.waiting.remove(sequence)
            return []
        self.waiting.ended(sequence)
        return self._vacate_all(sequence.beams)

    def _vacate_all(self, sequences: Iterable[Sequence]) -> list[SlotMove]:
        # From the last slot down, so that none is moved into the place of another.
        leaving = sorted(sequences, key=lambda sequence: sequence.slot, reverse=True)
        return [move for one in leaving if (move := self._vacate(one)) is not None]

    def _vacate(self, sequence: Sequence) -> SlotMove | None:
        sequence.account.slots -= 1
        hole, sequence.slot = sequence.slot, NO_SLOT
        last = self.running.pop()
        if last is sequence:
            return None
        move = SlotMove(source=last.slot, target=hole, length=last.length)
        self.running[hole] = last
        last.slot = hole
        return move


def _prefill_turn(sequence: Sequence) -> tuple[int, int, float]:
    account = sequence.account
    return -account.priority, account.last_prefill, sequence.arrived_at
