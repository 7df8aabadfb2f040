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

    @rule(prompt=st.integers(1, 20), beams=st.sampled_from([1, 1, 2, 3]))
    def add(self, prompt: int, beams: int) -> None:
        request = GenerationRequest("r", (1,) * prompt, SamplingParams(4, num_beams=beams))
        sequence = Sequence(request, prefix=None, arrived_at=float(len(self.live)))
        self.scheduler.add(sequence)
        self.live.append(sequence)

    @rule()
    def admit(self) -> None:
        longest_waiting = list(self.scheduler.waiting)
        admitted = self.scheduler.admit()
        leaders = [sequence for sequence in admitted if not sequence.is_sibling]
        assert leaders == longest_waiting[: len(leaders)]
        assert admitted == [beam for sequence in leaders for beam in sequence.beams]
        assert all(len(s.beams) == s.request.sampling.num_beams for s in leaders)
        for beam in admitted:
            assert beam.slot not in self.slot_holds
            self.slot_holds[beam.slot] = beam
        free = MAX_SLOTS - len(self.scheduler.running)
        assert not self.scheduler.waiting or len(self.scheduler.waiting[0].beams) > free

    @rule()
    def step(self) -> None:
        decoding = [s for s in self.scheduler.running if s.output_ids]
        prefilling = [s for s in self.scheduler.running if not s.is_sibling and not s.output_ids]
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
                for beam in span.sequence.beams if span in chunks else [span.sequence]:
                    beam.output_ids = [*beam.output_ids, 1]
                    beam.length = span.end
        # None is passed over for one that came later.
        unfinished = [s.arrived_at for s in prefilling if s.uncomputed_prompt]
        latest = max((c.sequence.arrived_at for c in chunks), default=-1.0)
        assert latest <= min(unfinished, default=1e9)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.live))
        self.live.remove(sequence)
        for beam in sequence.beams if sequence.slot != NO_SLOT else ():
            del self.slot_holds[beam.slot]
        for move in self.scheduler.remove(sequence):
            moved = self.slot_holds.pop(move.source)
            assert move.length == moved.length
            assert move.target not in self.slot_holds
            self.slot_holds[move.target] = moved
        assert all(beam.slot == NO_SLOT for beam in sequence.beams)

    @invariant()
    def slots_are_dense_and_each_holds_its_own_sequence(self) -> None:
        for slot, sequence in enumerate(self.scheduler.running):
            assert sequence.slot == slot
            assert self.slot_holds[slot] is sequence
        assert len(self.slot_holds) == len(self.scheduler.running) <= MAX_SLOTS

    @invariant()
    def nothing_is_lost(self) -> None:
        leaders = [s for s in self.scheduler.running if not s.is_sibling]
        held = [*leaders, *self.scheduler.waiting]
        assert sorted(map(id, held)) == sorted(map(id, self.live))
        beams = [beam for s in leaders for beam in s.beams]
        assert sorted(map(id, beams)) == sorted(map(id, self.scheduler.running))
        assert all(s.slot == NO_SLOT for s in self.scheduler.waiting)


SchedulerMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None
)
TestScheduler = SchedulerMachine.TestCase
