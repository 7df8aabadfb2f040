"""Which sequence has which slot, and what each computes in the next step."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from server.engine.sequence import NO_SLOT, Sequence


@dataclass(frozen=True, slots=True)
class Span:
    """What a sequence computes in one step: `token_ids` at positions `start`, `start + 1`, ...

    A chunk of its prompt, or the one token it generated last.
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
    def completes_prompt(self) -> bool:
        """True when the sequence's next token can be chosen after this span."""
        return self.end >= self.sequence.prompt_end


@dataclass(frozen=True, slots=True)
class SlotMove:
    """Slot `source`'s first `length` positions belong in slot `target` now."""

    source: int
    target: int
    length: int


class Scheduler:
    """First come, first served, over slots that are always the dense range 0 .. running - 1.

    Dense slots let a decode step read the KV memory as one slice, without a gather: when a
    sequence leaves, the last one moves into its place.
    """

    def __init__(self, max_slots: int, prefill_tokens: int) -> None:
        self.max_slots = max_slots
        self.prefill_tokens = prefill_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # running[i].slot == i

    @property
    def has_work(self) -> bool:
        """True while any sequence waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def admit(self) -> list[Sequence]:
        """Give free slots to the longest waiting sequences and return these.

        A sequence and its siblings get theirs together; until there are enough, nobody else does.
        """
        admitted: list[Sequence] = []
        while self.waiting:
            first = self.waiting[0]
            if len(self.running) + len(first.beams) > self.max_slots:
                break
            self.waiting.popleft()
            for sequence in first.beams:
                sequence.slot = len(self.running)
                sequence.length = sequence.prefix_length
                sequence.queue_seconds = time.perf_counter() - first.arrived_at
                self.running.append(sequence)
                admitted.append(sequence)
        return admitted

    def plan(self) -> list[Span]:
        """The next step: one token of every decoding sequence, then prompt chunks.

        At most `prefill_tokens` of the latter, earliest arrivals first: the bound keeps a long
        prompt from stalling the sequences that are decoding. A source, which an encoder can only
        read whole, may be over it.
        """
        spans = [
            Span(sequence, sequence.length, (sequence.output_ids[-1],))
            for sequence in self.running
            if sequence.output_ids
        ]
        budget = self.prefill_tokens
        prefilling = (s for s in self.running if not s.output_ids and not s.is_sibling)
        for sequence in sorted(prefilling, key=lambda s: s.arrived_at):
            if budget <= 0:
                break
            span = Span(sequence, sequence.length, sequence.uncomputed_prompt[:budget])
            if span.source_ids and span.num_tokens > budget < self.prefill_tokens:
                break
            spans.append(span)
            budget -= span.num_tokens
        return spans

    def remove(self, sequence: Sequence) -> list[SlotMove]:
        """Take a sequence out of the queue, or it and its siblings out of their slots.

        Returns the moves that keep slots dense, in their order.
        """
        if sequence.slot == NO_SLOT:
            self.waiting.remove(sequence)
            return []
        # From the last slot down, so that none is moved into the place of another.
        leaving = sorted(sequence.beams, key=lambda beam: beam.slot, reverse=True)
        return [move for beam in leaving if (move := self._vacate(beam)) is not None]

    def _vacate(self, sequence: Sequence) -> SlotMove | None:
        hole, sequence.slot = sequence.slot, NO_SLOT
        last = self.running.pop()
        if last is sequence:
            return None
        move = SlotMove(source=last.slot, target=hole, length=last.length)
        self.running[hole] = last
        last.slot = hole
        return move
