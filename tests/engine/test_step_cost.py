"""What a step is learnt to cost."""

from __future__ import annotations

import math
import random

import pytest

from server.engine.step_cost import StepCost


def learnt(seconds: list[tuple[float, float, float]], steps: int = 100) -> StepCost:
    """Of machines one after the other: seconds a step, a decoding row, a prompt token."""
    cost, rng = StepCost(), random.Random(1)
    for step, row, token in seconds:
        for _ in range(steps):
            rows, tokens = rng.randint(0, 64), rng.randint(0, 256)
            noise = rng.uniform(0.95, 1.05)
            cost.observe(rows, tokens, noise * (step + row * rows + token * tokens))
    return cost


def test_it_finds_how_many_prompt_tokens_make_a_step_so_much_longer() -> None:
    cost = learnt([(0.007, 0.0008, 0.00045)])
    for rows in (8, 64):
        expected = 0.3 * (0.007 + 0.0008 * rows) / 0.00045
        assert cost.prompt_tokens(rows, 0.3) == pytest.approx(expected, rel=0.2)


def test_it_follows_a_machine_that_becomes_slower() -> None:
    cost = learnt([(0.1, 0.0, 0.0001), (0.1, 0.0, 0.01)], steps=400)
    assert cost.prompt_tokens(0, 0.5) == pytest.approx(5, rel=0.2)


def test_prompts_that_cost_nothing_are_not_bounded() -> None:
    cost = StepCost()
    for tokens in range(20):
        assert cost.prompt_tokens(4, 0.3) > 1e6
        cost.observe(4, tokens, 0.01)
    assert cost.prompt_tokens(4, 0.3) > 1e6


def test_steps_that_are_all_alike_or_took_no_time_do_no_harm() -> None:
    cost = StepCost()
    for _ in range(20):
        cost.observe(0, 64, 0.0)
    assert cost.prompt_tokens(0, 0.3) == math.inf
    for _ in range(20):
        cost.observe(0, 64, 1.0)
    assert 0 <= cost.prompt_tokens(0, 0.3) < 8
