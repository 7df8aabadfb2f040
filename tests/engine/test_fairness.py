"""What tenants are promised, on a simulated clock."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from itertools import count, cycle
from statistics import quantiles

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from server.engine.account import INPUT_COST, OUTPUT_COST, Account
from server.engine.places import Places
from server.engine.protocol import GenerationRequest, QueueFullError, SamplingParams
from server.engine.scheduler import Span
from server.engine.sequence import NO_SLOT
from tests.engine.simulation import Simulation

LONGEST_PROMPT = LONGEST_OUTPUT = 16

shapes = st.tuples(st.integers(1, LONGEST_PROMPT), st.integers(1, LONGEST_OUTPUT))
weights = st.sampled_from([0.5, 1.0, 1.0, 2.0, 3.0])


def bound(slots: int, *weights: float) -> float:
    """The paper's, of two tenants that always have something waiting (theorem 4.4)."""
    positions = slots * (LONGEST_PROMPT + LONGEST_OUTPUT)
    return 2 * max(INPUT_COST * LONGEST_PROMPT, OUTPUT_COST * positions) / min(weights)


@settings(max_examples=60, deadline=None)
@given(
    slots=st.integers(1, 4),
    prefill_tokens=st.integers(2, 24),
    one=st.tuples(weights, st.lists(shapes, min_size=1, max_size=4)),
    other=st.tuples(weights, st.lists(shapes, min_size=1, max_size=4)),
    passers=st.lists(
        st.tuples(st.integers(0, 150), st.sampled_from("xyz"), shapes, weights), max_size=30
    ),
    cancelled=st.sets(st.integers(0, 150), max_size=10),
)
def test_the_difference_of_two_backlogged_tenants_is_bounded(
    *,
    slots: int,
    prefill_tokens: int,
    one: tuple[float, list[tuple[int, int]]],
    other: tuple[float, list[tuple[int, int]]],
    passers: list[tuple[int, str, tuple[int, int], float]],
    cancelled: set[int],
) -> None:
    simulation = Simulation(slots, prefill_tokens)
    backlogged = {"one": (one[0], cycle(one[1])), "other": (other[0], cycle(other[1]))}
    differences = []
    for step in range(250):
        for tenant, (weight, endless) in backlogged.items():
            while simulation.waiting(tenant) <= slots:
                simulation.ask(tenant, *next(endless), weight=weight)
        for at, tenant, shape, weight in passers:
            if at == step:
                simulation.ask(tenant, *shape, weight=weight)
        if step in cancelled and simulation.scheduler.running:
            simulation.scheduler.remove(simulation.scheduler.running[0])
        simulation.step()
        served = {tenant: simulation.served[tenant] / w for tenant, (w, _) in backlogged.items()}
        differences.append(served["one"] - served["other"])
    assert max(differences) - min(differences) <= bound(slots, one[0], other[0])
    # The counters are what was served, to the token, whoever lost a slot meanwhile.
    counters = {a.tenant: a.served for a in simulation.scheduler.waiting.accounts}
    assert counters["one"] - counters["other"] == pytest.approx(differences[-1], abs=1e-6)


def test_long_requests_get_no_more_than_short_ones() -> None:
    simulation = Simulation(max_slots=4)
    for _ in range(2000):
        while simulation.waiting("long") < 5:
            simulation.ask("long", 16, 16)
        while simulation.waiting("short") < 5:
            simulation.ask("short", 1, 2)
        simulation.step()
    assert simulation.served["long"] == pytest.approx(simulation.served["short"], rel=0.02)


def test_service_is_in_proportion_to_weights() -> None:
    simulation = Simulation(max_slots=6)
    weights = {"a": 1.0, "b": 2.0, "c": 3.0}
    for _ in range(3000):
        for tenant, weight in weights.items():
            while simulation.waiting(tenant) < 7:
                simulation.ask(tenant, 3, 5, weight=weight)
        simulation.step()
    total = simulation.served.total()
    shares = {tenant: simulation.served[tenant] / total for tenant in weights}
    assert shares == pytest.approx({"a": 1 / 6, "b": 2 / 6, "c": 3 / 6}, rel=0.05)


def test_nobody_saves_up_turns_while_away() -> None:
    simulation = Simulation(max_slots=2)
    simulation.ask("away")
    for _ in range(1000):
        while simulation.waiting("busy") < 3:
            simulation.ask("busy")
        simulation.step()
    before = simulation.served.copy()
    for _ in range(500):
        for tenant in ("busy", "away"):
            while simulation.waiting(tenant) < 3:
                simulation.ask(tenant)
        simulation.step()
    got = simulation.served - before
    assert abs(got["busy"] - got["away"]) <= bound(2, 1.0)
    assert got["busy"] > 200


@settings(max_examples=50, deadline=None)
@given(
    flood=st.integers(1, 60),
    shape=st.tuples(st.integers(1, 30), st.integers(1, 300)),
    steps=st.integers(1, 200),
    weight=st.sampled_from([0.1, 1.0, 3.0]),
)
def test_who_has_nothing_here_is_admitted_at_the_next_step(
    flood: int, shape: tuple[int, int], steps: int, weight: float
) -> None:
    simulation = Simulation(max_slots=3)
    for _ in range(flood):
        simulation.ask("flood", *shape, weight=5.0)
    for _ in range(steps):
        simulation.step()
    sequence = simulation.ask("guest", 4, 4, weight=weight)
    simulation.step()
    assert simulation.holds("guest") == 1
    assert sequence.queue_seconds == 0
    while simulation.scheduler.has_work:
        simulation.step()
    assert len(simulation.finished) == flood + 1


def test_a_flood_does_not_make_a_guest_wait() -> None:
    """The flood asks for fifty times what there is; the guest for less than its half."""
    simulation = Simulation(max_slots=8)
    guests = []
    for step in range(2000):
        if step % 2 == 0:
            simulation.ask("flood", 4, 64)
        if step % 10 == 0:
            guests.append(simulation.ask("guest", 4, 20))
        simulation.step()
    assert simulation.waiting("flood") > 500
    assert max(guest.queue_seconds for guest in guests) <= 2
    assert simulation.preempted <= len(guests)


def test_several_requests_of_who_is_below_its_share_do_not_wait_for_turns() -> None:
    simulation = Simulation(max_slots=8)
    for _ in range(20):
        simulation.ask("flood", 4, 64)
    for _ in range(10):
        simulation.step()
    guests = [simulation.ask("guest", 4, 20) for _ in range(4)]
    simulation.step()
    assert simulation.holds("guest") == 4
    assert all(guest.queue_seconds == 0 for guest in guests)


def seconds(spans: list[Span]) -> float:
    """A step as a small model takes it on two cores: read the weights, and compute each row."""
    decoding = sum(span.start >= span.sequence.prefill_end for span in spans)
    return 0.007 + 0.0008 * decoding + 0.00045 * (sum(s.num_tokens for s in spans) - decoding)


def guests_p99_queue_seconds(*, flood: bool) -> float:
    """Of a guest that asks 7 times a second at random, a quarter of what can be served.

    The flood asks for so much that the queue is always full.
    """
    simulation = Simulation(64, 256, seconds)
    rng = random.Random(1)
    arrival, guests = 0.0, []
    while simulation.now < 60:
        while arrival <= simulation.now:
            guests.append(simulation.ask("guest", rng.randint(30, 70), 16, at=arrival))
            arrival += rng.expovariate(7)
        while flood and len(simulation.scheduler.waiting) < 100:
            simulation.ask("flood", rng.randint(30, 70), 16)
        if simulation.scheduler.has_work:
            simulation.step()
        else:
            simulation.now = arrival
    return quantiles([guest.queue_seconds for guest in guests], n=100)[98]


def test_beside_a_flood_a_guest_waits_at_most_twice_as_long_as_alone() -> None:
    alone = guests_p99_queue_seconds(flood=False)
    assert 0 < alone < guests_p99_queue_seconds(flood=True) <= 2 * alone


def test_a_slot_that_was_given_up_is_not_taken_back() -> None:
    simulation = Simulation(max_slots=6)
    for tenant in ("a", "b", "c"):
        for _ in range(10):
            simulation.ask(tenant, 1, 100)
        simulation.step()
    taken = simulation.preempted
    for _ in range(50):
        simulation.step()
    assert [simulation.holds(tenant) for tenant in "abc"] == [2, 2, 2]
    assert simulation.preempted == taken == 5


def test_who_yields_does_not_get_the_slot_back_where_all_else_is_equal() -> None:
    simulation = Simulation(max_slots=8)
    # In slots for each weight, the one that yields is then even with the one it yields to.
    weights = {"c": 0.605, "b": 1.0, "a": 0.5}
    for tenant in "ccccbbaa":
        simulation.ask(tenant, 1, 50, weight=weights[tenant])
        simulation.step()
    next_of_b = simulation.ask("b", 1, 50, weight=1.0)
    for account in simulation.scheduler.waiting.accounts:
        account.served = 1000.0
    simulation.step()
    assert next_of_b.slot != NO_SLOT
    assert [simulation.holds(tenant) for tenant in "abc"] == [1, 3, 4]


def test_the_newest_yields_and_goes_on_before_those_that_never_ran() -> None:
    simulation = Simulation(max_slots=2)
    flood = []
    for _ in range(4):
        flood.append(simulation.ask("flood", 2, 20))
        simulation.step()
    guest = simulation.ask("guest", 2, 3)
    simulation.step()
    assert [sequence.slot == NO_SLOT for sequence in flood] == [False, True, True, True]
    while guest not in simulation.finished:
        simulation.step()
    simulation.step()
    assert [sequence.slot == NO_SLOT for sequence in flood] == [False, False, True, True]


def test_a_lower_priority_runs_in_what_is_left_and_gives_it_up() -> None:
    simulation = Simulation(max_slots=4)
    batch = [simulation.ask("t", 3, 50, priority=-1) for _ in range(8)]
    for _ in range(10):
        simulation.step()
    assert simulation.holds("t") == 4
    interactive = [simulation.ask("t", 3, 5), simulation.ask("other", 3, 5, beams=3)]
    simulation.step()
    assert [sequence.slot for sequence in interactive] != [-1, -1]
    assert all(sequence.slot == -1 for sequence in batch)
    assert all(sequence.queue_seconds == 0 for sequence in interactive)
    while simulation.scheduler.has_work:
        simulation.step()
    assert {id(s) for s in simulation.finished} == {id(s) for s in (*batch, *interactive)}
    assert all(len(sequence.output_ids) == 50 for sequence in batch)


def test_what_ran_at_a_low_priority_is_not_held_against_a_tenant() -> None:
    simulation = Simulation(max_slots=2)
    for _ in range(6):
        simulation.ask("a", 3, 60, priority=-1)
    for _ in range(100):
        simulation.step()
    simulation.ask("b")
    simulation.ask("a")
    simulation.step()
    assert simulation.holds("a") == simulation.holds("b") == 1


def test_long_prompts_do_not_hold_up_another_tenants() -> None:
    simulation = Simulation(max_slots=8, prefill_tokens=16)
    for _ in range(7):
        simulation.ask("long", 1000, 1)
    simulation.step()
    short = simulation.ask("short", 10, 1)
    for _ in range(2):
        simulation.step()
    assert simulation.finished == [short]


def flooded(seconds: Callable[[list[Span]], float]) -> tuple[Simulation, Callable[[], int]]:
    """A flood of long prompts that has run a while; and a step, which gives its prompt tokens."""
    simulation = Simulation(max_slots=8, prefill_tokens=64, seconds=seconds)

    def step() -> int:
        for _ in range(9 - simulation.waiting("flood")):
            simulation.ask("flood", 100, 1)
        return simulation.step()["flood"]

    for _ in range(100):
        assert step() == 64  # it is alone
    return simulation, step


def test_a_floods_prompts_are_a_small_part_of_a_step_while_another_may_come() -> None:
    """Who comes waits for the end of a step, so no step may be long for prompts of a backlog."""
    simulation, step = flooded(lambda spans: 0.1 + 0.02 * sum(span.num_tokens for span in spans))
    simulation.ask("guest", 5, 1)
    assert step() == 8 - 5
    simulation.ask("guest", 40, 1)
    assert step() == 0
    assert simulation.holds("guest") == 0
    left = simulation.now
    while simulation.now < left + 59:
        assert step() == 8
    while simulation.now < left + 61:
        step()
    assert step() == 64


def test_a_flood_is_not_held_back_where_prompts_make_no_step_longer() -> None:
    """As on a GPU, whose steps take as long as reading the weights."""
    simulation, step = flooded(lambda _: 1.0)
    simulation.ask("guest", 5, 1)
    for _ in range(10):  # until now every step was alike, and told nothing of prompts alone
        step()
    assert [step() for _ in range(20)] == [64] * 20


def test_two_floods_have_the_whole_bound() -> None:
    simulation, step = flooded(lambda spans: 0.1 + 0.02 * sum(span.num_tokens for span in spans))
    started = simulation.now
    while simulation.now < started + 70:
        for _ in range(9 - simulation.waiting("other")):
            simulation.ask("other", 100, 1)
        step()
    assert simulation.step().total() == 64


def test_time_without_a_slot_is_counted_after_it_was_lost_too() -> None:
    simulation = Simulation(max_slots=1)
    sequence = simulation.ask("t", 40, 5, priority=-1)
    simulation.step()
    simulation.ask("t", 16, 3)  # takes the slot for three steps, in the middle of the prompt
    for _ in range(3):
        simulation.step()
    assert sequence.slot == -1
    simulation.step()
    assert sequence.queue_seconds == 3


def test_tenants_that_are_gone_are_forgotten_at_last() -> None:
    simulation = Simulation(max_slots=1)
    for number in range(1500):
        simulation.ask(f"tenant-{number}", 1, 1)
        simulation.step()
        simulation.finished.clear()
    assert sum(type(thing) is Account for thing in gc.get_objects()) < 1100


def test_a_full_queue_refuses_whoever_has_more_than_an_equal_share() -> None:
    places = Places(max_slots=2, max_waiting=10)
    names = count()
    held: dict[str, list[str]] = {"flood": [], "guest": [], "third": []}

    def take(tenant: str, times: int = 1) -> None:
        for _ in range(times):
            request = GenerationRequest(str(next(names)), (1,), SamplingParams(1), tenant=tenant)
            places.take(request)
            held[tenant].append(request.request_id)

    def give_back(tenant: str, times: int) -> None:
        for _ in range(times):
            places.give_back(held[tenant].pop())

    places.check("flood", 12)
    with pytest.raises(QueueFullError):
        places.check("flood", 13)
    take("flood", 12)
    places.check("guest", 6)  # half of all
    with pytest.raises(QueueFullError):
        places.check("guest", 7)
    with pytest.raises(QueueFullError, match="10 sequences may wait, each beam being one; try"):
        take("flood")
    take("guest", 6)
    with pytest.raises(QueueFullError, match="6 of those here are yours"):
        take("guest")
    take("third", 4)
    with pytest.raises(QueueFullError):
        take("third")
    give_back("flood", 6)
    with pytest.raises(QueueFullError):
        take("flood")  # sixteen are here, and it has six of them
    give_back("guest", 5)
    take("flood")
    with pytest.raises(QueueFullError):
        take("flood")
