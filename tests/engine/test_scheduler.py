"""The scheduler as a state machine, against the rules it promises."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.engine.protocol import GenerationRequest, SamplingParams
from server.engine.scheduler import Scheduler, SlotMove
from server.engine.sequence import NO_SLOT, Sequence

MAX_SLOTS = 3
PREFILL_TOKENS = 7


class SchedulerMachine(RuleBasedStateMachine):
    """Adds, admits, prefills and removes in any order; tracks what each slot's memory holds."""

    tenants = ("a", "b", "c")
    priorities = (0, 0, -1)

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(MAX_SLOTS, PREFILL_TOKENS)
        self.live: list[Sequence] = []
        self.asked = 0
        self.slot_holds: dict[int, Sequence] = {}

    @rule(prompt=st.integers(1, 20), beams=st.sampled_from([1, 1, 2, 3]), data=st.data())
    def add(self, prompt: int, beams: int, data: st.DataObject) -> None:
        request = GenerationRequest(
            "r",
            (1,) * prompt,
            SamplingParams(4, num_beams=beams),
            tenant=data.draw(st.sampled_from(self.tenants)),
            priority=data.draw(st.sampled_from(self.priorities)),
            weight=data.draw(st.sampled_from([1.0, 2.0])),
        )
        self.asked += 1
        sequence = Sequence(request, prefix=None, arrived_at=float(self.asked))
        self.scheduler.add(sequence)
        self.live.append(sequence)

    @rule()
    def admit(self) -> None:
        admission = self.scheduler.admit()
        self.follow(list(admission.moves), admitting=True)
        waiting = list(self.scheduler.waiting)
        for slot, holder in list(self.slot_holds.items()):
            if holder.slot == NO_SLOT:  # it was preempted, and nobody was moved there
                assert holder in waiting
                del self.slot_holds[slot]
        leaders = [sequence for sequence in admission.sequences if not sequence.is_sibling]
        assert list(admission.sequences) == [beam for one in leaders for beam in one.beams]
        assert all(len(s.beams) == s.request.sampling.num_beams for s in leaders)
        for beam in admission.sequences:
            assert beam.slot not in self.slot_holds
            assert beam.length == beam.prefix_length
            self.slot_holds[beam.slot] = beam
        self.check_turns(leaders, waiting)
        free = MAX_SLOTS - len(self.scheduler.running)
        assert not waiting or len(self.scheduler.waiting.first.beams) > free

    def check_turns(self, leaders: list[Sequence], waiting: list[Sequence]) -> None:
        """Nobody is before a higher priority, nor before an earlier one of its own tenant."""
        for sequence in leaders:
            for other in waiting:
                assert other.account.priority <= sequence.account.priority
                assert other.account is not sequence.account or (
                    other.arrived_at > sequence.arrived_at or other.was_preempted
                )

    def follow(self, moves: list[SlotMove], *, admitting: bool = False) -> None:
        """Carry out moves; a slot that is moved into was given up.

        While admitting, what is moved may have got its slot just now: then nothing is there yet.
        """
        for move in moves:
            gone = self.slot_holds.pop(move.target, None)
            assert gone is None or gone.slot == NO_SLOT
            if admitting and move.source not in self.slot_holds:
                continue
            moved = self.slot_holds.pop(move.source)
            assert move.length == moved.length
            self.slot_holds[move.target] = moved

    @rule()
    def step(self) -> None:
        running = self.scheduler.running
        decoding = [s for s in running if s.is_decoding]
        prefilling = [s for s in running if not s.is_sibling and not s.is_decoding]
        queue = self.scheduler.waiting
        least_of_backlogs = PREFILL_TOKENS // (8 if queue.expects_others else 1)
        remaining = {s: len(s.uncomputed) for s in prefilling}
        others = sum(left for s, left in remaining.items() if not queue.has(s.account))
        spans = self.scheduler.plan()
        chunks = [span for span in spans if span.sequence not in decoding]
        assert [s.sequence for s in spans if s.sequence in decoding] == decoding
        computed = {chunk.sequence: len(chunk.token_ids) for chunk in chunks}
        of_backlogs = sum(n for s, n in computed.items() if queue.has(s.account))
        assert sum(computed.values()) - of_backlogs == min(PREFILL_TOKENS - of_backlogs, others)
        if of_backlogs < least_of_backlogs - others:
            assert computed == remaining
        self.scheduler.observe(spans, 0.1 * sum(span.num_tokens for span in spans))
        for span in spans:
            assert span.token_ids
            assert span.start == span.sequence.length
            span.sequence.length = span.end
            if span.completes_prompt:
                for beam in span.sequence.beams if span in chunks else [span.sequence]:
                    beam.output_ids = [*beam.output_ids, 1]
                    beam.length = span.end
        # None is passed over for one of its tenant's that came later.
        unfinished = [s for s in prefilling if s.uncomputed]
        for chunk in chunks:
            for other in unfinished:
                if other.account is chunk.sequence.account:
                    assert chunk.sequence.arrived_at <= other.arrived_at

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.live))
        self.live.remove(sequence)
        for beam in sequence.beams if sequence.slot != NO_SLOT else ():
            del self.slot_holds[beam.slot]
        self.follow(self.scheduler.remove(sequence))
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
        assert len(self.scheduler.waiting) == len(self.live) - len(leaders)

    @invariant()
    def accounts_know_what_they_hold(self) -> None:
        for account in self.scheduler.waiting.accounts:
            own = [s for s in self.live if s.account is account]
            assert account.live == len(own)
            assert account.slots == sum(len(s.beams) for s in own if s.slot != NO_SLOT)


class OneTenantMachine(SchedulerMachine):
    """With one tenant nothing is new: first come, first served, and no slot is ever given up."""

    tenants = ("",)
    priorities = (0,)

    def check_turns(self, leaders: list[Sequence], waiting: list[Sequence]) -> None:
        arrived = [sequence.arrived_at for sequence in leaders]
        assert arrived == sorted(arrived)
        assert max(arrived, default=0.0) < min((s.arrived_at for s in waiting), default=1e9)
        assert not any(sequence.was_preempted for sequence in self.live)


OneTenantMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None
)
TestOneTenant = OneTenantMachine.TestCase
SchedulerMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None
)
TestScheduler = SchedulerMachine.TestCase
