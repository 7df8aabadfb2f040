"""Beams among other requests: their slots, their neighbours, and how they leave."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch

from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix
from server.engine.choose_runner import choose_runner
from server.engine.core import EngineCore
from server.engine.protocol import (
    EngineConfig,
    EngineFailedError,
    GenerationRequest,
    SamplingParams,
    TokenEvent,
)
from server.engine.runner import Runner, TransformersRunner
from server.engine.sequence import Sequence
from server.engine.special_tokens import SpecialTokens
from tests.conftest import VOCAB, tiny_model
from tests.engine.reference import random_prefix, searched

MAX_SLOTS, MAX_LENGTH, NEW = 6, 80, 12
CONFIG = EngineConfig(MAX_SLOTS, MAX_LENGTH, prefill_tokens=16)
EOS = range(5, VOCAB, 8)  # many, so that texts end at different times
RUNNERS = ("packed", "general", "gpt2")


@dataclass(frozen=True)
class Plan:
    """A request and the step before which it arrives."""

    prompt_ids: tuple[int, ...]
    prefix_length: int = 0
    sampling: dict[str, Any] = field(default_factory=dict)
    arrives_at: int = 0

    def prefix(self, loaded: LoadedModel) -> Prefix | None:
        if self.prefix_length == 0:
            return None
        return random_prefix(loaded, self.prefix_length, seed=self.prefix_length)

    def sequence(self, loaded: LoadedModel, name: str) -> Sequence:
        params = SamplingParams(**{"max_new_tokens": NEW, **self.sampling})
        return Sequence(GenerationRequest(name, self.prompt_ids, params), self.prefix(loaded))

    def alone(self, loaded: LoadedModel) -> list[int]:
        return searched(
            loaded,
            self.prefix(loaded),
            self.prompt_ids,
            eos_token_id=list(EOS),
            **{"max_new_tokens": NEW, "num_beams": 1, **self.sampling},
        )


@cache
def model_of(name: str) -> LoadedModel:
    return tiny_model("gpt2" if name == "gpt2" else "llama")


class Batch:
    """An engine's core, and what each request was told."""

    def __init__(self, runner: str) -> None:
        self.loaded = model_of(runner)
        self.runner: Runner = (
            choose_runner(self.loaded, MAX_SLOTS, MAX_LENGTH)
            if runner == "packed"
            else TransformersRunner(self.loaded, MAX_SLOTS, MAX_LENGTH)
        )
        self.core = EngineCore(self.runner, CONFIG, SpecialTokens(frozenset(EOS)))
        self.told: dict[str, list[Any]] = {}
        self.order: list[str] = []

    def add(self, name: str, plan: Plan) -> None:
        self.told[name] = []
        self.core.add(plan.sequence(self.loaded, name))

    def step(self) -> None:
        for name, event in self.core.step().events:
            self.told[name].append(event)
            self.order.append(name)
        self.check_slots()

    def run(self, plans: dict[str, Plan]) -> dict[str, list[int]]:
        """Every plan's tokens."""
        step = 0
        while self.core.has_work or step <= max(plan.arrives_at for plan in plans.values()):
            for name, plan in plans.items():
                if plan.arrives_at == step:
                    self.add(name, plan)
            self.step()
            step += 1
        return {name: self.tokens(name) for name in plans}

    def check_slots(self) -> None:
        """Slots are dense, and a search has one for each of its beams or none."""
        running = self.core._scheduler.running
        assert [sequence.slot for sequence in running] == list(range(len(running)))
        leaders = [sequence for sequence in running if not sequence.is_sibling]
        owned = [beam for leader in leaders for beam in leader.beams]
        assert sorted(map(id, owned)) == sorted(map(id, running))

    def tokens(self, name: str) -> list[int]:
        events = self.told[name]
        assert all(isinstance(event, TokenEvent) for event in events), events
        return [event.chosen.token_id for event in events]


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize(
    "sampling",
    [
        {"num_beams": 2, "no_repeat_ngram_size": 2},
        {"num_beams": 5, "min_new_tokens": 4, "early_stopping": True},
        {"num_beams": 6, "length_penalty": -0.8},
    ],
    ids=str,
)
def test_behind_prefixes_of_any_length(runner: str, sampling: dict[str, Any]) -> None:
    batch = Batch(runner)
    plans = {
        str(length): Plan(
            tuple(6 + (7 * length + 5 * i) % 90 for i in range(1 + length)), length, sampling
        )
        for length in (0, 1, 4, 9, 17)
    }
    found = batch.run(plans)
    assert found == {name: plan.alone(batch.loaded) for name, plan in plans.items()}


@pytest.mark.parametrize("runner", RUNNERS)
def test_neighbours_neither_disturb_nor_are_disturbed(runner: str) -> None:
    sampled = Plan((7, 8), 0, {"do_sample": True, "seed": 3, "ignore_eos": True}, arrives_at=2)
    compared = {
        "greedy": Plan(tuple(range(6, 30)), 3),
        "search": Plan((9, 10, 11), 8, {"num_beams": 3, "early_stopping": "never"}, arrives_at=1),
    }
    batch = Batch(runner)
    found = batch.run({**compared, "sampled": sampled})
    assert found.pop("sampled") == Batch(runner).run({"alone": sampled})["alone"]
    assert found == {name: plan.alone(batch.loaded) for name, plan in compared.items()}


def test_a_search_waits_for_a_slot_for_each_beam_and_is_not_overtaken() -> None:
    batch = Batch("packed")
    endless = {"ignore_eos": True}
    batch.add("first", Plan((7, 8), 0, {**endless, "max_new_tokens": 6}))
    batch.add("search", Plan((9, 10), 0, {**endless, "num_beams": 6, "max_new_tokens": 4}))
    batch.add("last", Plan((11, 12), 0, {**endless, "max_new_tokens": 2}))
    for _ in range(6):
        batch.step()
        assert batch.core.stats.waiting == 2
    while batch.core.has_work:
        batch.step()
    assert batch.order == ["first"] * 6 + ["search"] * 4 + ["last"] * 2


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("steps", [0, 1, 2, 4])  # waiting, in its prompt, at its first token, later
def test_cancelling_frees_every_beam(runner: str, steps: int) -> None:
    batch = Batch(runner)
    batch.add("search", Plan(tuple(range(6, 30)), 0, {"num_beams": 4}))
    neighbour = Plan((7, 8), 3)
    batch.add("neighbour", neighbour)
    for _ in range(steps):
        batch.step()
    batch.core.cancel("search")
    assert batch.core.stats.waiting + batch.core.stats.running == 1
    while batch.core.has_work:
        batch.step()
    assert batch.tokens("search") == []
    assert batch.tokens("neighbour") == neighbour.alone(batch.loaded)


@pytest.mark.parametrize("runner", RUNNERS)
def test_nan_in_one_beam_ends_its_search_alone(
    runner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = Batch(runner)
    forward = batch.runner.forward

    def break_one(spans: list[Any]) -> torch.Tensor:
        logits = forward(spans).clone()
        rows = [i for i, s in enumerate(spans) if s.sequence.request.request_id == "broken"]
        if len(rows) > 1:
            logits[rows[1], 4] = torch.nan
        return logits

    monkeypatch.setattr(batch.runner, "forward", break_one)
    plans = {"greedy": Plan((7, 8), 3), "search": Plan((11, 12), 0, {"num_beams": 2})}
    batch.add("broken", Plan((9, 10), 0, {"num_beams": 3}))
    found = batch.run(plans)
    assert [type(event) for event in batch.told["broken"]] == [EngineFailedError]
    assert found == {name: plan.alone(batch.loaded) for name, plan in plans.items()}


def test_a_failed_step_ends_a_search_once(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch("packed")
    batch.add("search", Plan((9, 10), 0, {"num_beams": 3}))
    batch.step()
    with monkeypatch.context() as fault:
        fault.setattr(batch.runner, "forward", lambda spans: spans[len(spans)])
        batch.step()
    assert [type(event) for event in batch.told["search"]] == [EngineFailedError]
    assert not batch.core.has_work
