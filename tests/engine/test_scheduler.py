"""The scheduler as a state machine, against the rules it promises."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.engine.protocol import GenerationRequest, SamplingParams
from server.engine.scheduler import Scheduler
from server.engine.sequence import NO_SLOT, Sequence

MAX_SLOTS = 3
PREFILL_TOKENS = 7


class SchedulerMachine(RuleBasedStateMachine):
    """Adds, admits, prefills and removes in any order; tracks what each slot's memory holds."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(MAX_SLOTS, PREFILL_TOKENS)
        self.live: list[Sequence] = []
        self.slot_holds: dict[int, Sequence] = {}

    @rule(prompt=st.integers(1, 20))
    def add(self, prompt: int) -> None:
        request = GenerationRequest("r", (1,) * prompt, SamplingParams(4))
        sequence = Sequence(request, prefix=None, arrived_at=float(len(self.live)))
        self.scheduler.add(sequence)
        self.live.append(sequence)

    @rule()
    def admit(self) -> None:
        longest_waiting = list(self.scheduler.waiting)
        admitted = self.scheduler.admit()
        assert admitted == longest_waiting[: len(admitted)]
        for sequence in admitted:
            self.slot_holds[sequence.slot] = sequence
        assert not self.scheduler.waiting or len(self.scheduler.running) == MAX_SLOTS

    @rule()
    def step(self) -> None:
        decoding = [s for s in self.scheduler.running if s.output_ids]
        prefilling = [s for s in self.scheduler.running if not s.output_ids]
        remaining = sum(len(s.uncomputed_prompt) for s in prefilling)
        spans = self.scheduler.plan()
        chunks = [span for span in spans if not span.sequence.output_ids]
        assert [s.sequence for s in spans if s.sequence.output_ids] == decoding
        assert sum(len(chunk.token_ids) for chunk in chunks) == min(PREFILL_TOKENS, remaining)
        for span in spans:
            assert span.token_ids
            assert span.start == span.sequence.length
            span.sequence.length = span.end
            if span.completes_prompt:
                span.sequence.output_ids.append(1)
        # None is passed over for one that came later.
        unfinished = [s.arrived_at for s in prefilling if s.uncomputed_prompt]
        latest = max((c.sequence.arrived_at for c in chunks), default=-1.0)
        assert latest <= min(unfinished, default=1e9)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.live))
        self.live.remove(sequence)
        move = self.scheduler.remove(sequence)
        if move is not None:
            moved = self.slot_holds.pop(move.source)
            assert move.length == moved.length
            self.slot_holds[move.target] = moved

    @invariant()
    def slots_are_dense_and_each_holds_its_own_sequence(self) -> None:
        for slot, sequence in enumerate(self.scheduler.running):
            assert sequence.slot == slot
            assert self.slot_holds[slot] is sequence
        assert len(self.scheduler.running) <= MAX_SLOTS

    @invariant()
    def nothing_is_lost(self) -> None:
        held = [*self.scheduler.running, *self.scheduler.waiting]
        assert sorted(map(id, held)) == sorted(map(id, self.live))
        assert all(s.slot == NO_SLOT for s in self.scheduler.waiting)


SchedulerMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None
)
TestScheduler = SchedulerMachine.TestCase
