"""Beam search, and what is done to scores: transformers' `generate` on a request alone decides."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix
from server.engine.choose_runner import choose_runner
from server.engine.core import EngineCore
from server.engine.prefill import Prefill
from server.engine.protocol import (
    EngineConfig,
    EngineFailedError,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    TokenEvent,
)
from server.engine.runner import TransformersRunner
from server.engine.sequence import Sequence
from server.engine.special_tokens import SpecialTokens
from tests.conftest import tiny_encoder_decoder, tiny_model

SLOTS = 7
MAX_LENGTH = 80
# Many ways to end, so that hypotheses end at different times.
EOS = tuple(range(5, 30))
PROMPTS = ((11, 12, 13), (20, 21, 22, 23, 24, 25), (31,), (40, 41) * 9)
GRID = [
    {"num_beams": beams, "length_penalty": penalty, "early_stopping": early}
    for beams, penalty, early in product((2, 3), (-1.0, 0.0, 1.0, 2.0), (False, True, "never"))
]
PROCESSED = [
    {"num_beams": 3, "no_repeat_ngram_size": 2},
    {"num_beams": 3, "no_repeat_ngram_size": 1},
    {"num_beams": 2, "min_new_tokens": 8},
    {"num_beams": 3, "repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"min_new_tokens": 9},
    {"min_new_tokens": 4, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
]
SHAPES = ("llama", "gpt2", "bart", "t5")


@dataclass(frozen=True)
class Plan:
    """A request, the step before which it arrives, and the step before which it is cancelled."""

    prompt_ids: tuple[int, ...]
    params: dict[str, Any] = field(default_factory=dict)
    arrives_at: int = 0
    cancelled_at: int | None = None
    text: tuple[int, ...] = ()
    new: int = 12


def model(shape: str) -> LoadedModel:
    if shape not in {"bart", "t5"}:
        return tiny_model(shape)
    loaded = tiny_encoder_decoder(shape)
    with torch.no_grad():  # so that texts vary, and end
        for weight in (weight for weight in loaded.model.parameters() if weight.ndim > 1):
            weight.normal_(0, 0.5)
    return loaded


def prefix_of(loaded: LoadedModel, plan: Plan) -> Prefix | None:
    """What the plan's text leaves behind."""
    if not plan.text:
        return None
    prefill = Prefill(loaded, plan.text)
    prefill.advance(0, len(plan.text))
    return prefill.prefix()


def new_core(loaded: LoadedModel, special: SpecialTokens, *, general: bool) -> EngineCore:
    runner = (
        TransformersRunner(loaded, SLOTS, MAX_LENGTH)
        if general
        else choose_runner(loaded, SLOTS, MAX_LENGTH)
    )
    config = EngineConfig(max_slots=SLOTS, max_length=MAX_LENGTH, prefill_tokens=16)
    return EngineCore(runner, config, special)


def special_of(loaded: LoadedModel, **fields: Any) -> SpecialTokens:
    start = SpecialTokens.of(loaded).decoder_start
    return SpecialTokens(eos=frozenset(EOS), decoder_start=start, **fields)


def run(
    loaded: LoadedModel,
    plans: list[Plan],
    *,
    general: bool = False,
    **forced: int,
) -> list[list[TokenEvent | EngineFailedError]]:
    """Every plan's events, with arrivals and cancellations at their steps."""
    special = special_of(loaded, **forced)
    core = new_core(loaded, special, general=general)
    start = () if special.decoder_start is None else (special.decoder_start,)
    events: list[list[TokenEvent | EngineFailedError]] = [[] for _ in plans]
    step = 0
    while core.has_work or any(plan.arrives_at >= step for plan in plans):
        for index, plan in enumerate(plans):
            if plan.arrives_at == step:
                params = SamplingParams(max_new_tokens=plan.new, **plan.params)
                request = GenerationRequest(str(index), plan.prompt_ids, params)
                core.add(Sequence(request, prefix_of(loaded, plan), start))
            if plan.cancelled_at == step:
                core.cancel(str(index))
        for request_id, event in core.step().events:
            events[int(request_id)].append(event)
        running = core._scheduler.running
        assert [sequence.slot for sequence in running] == list(range(len(running)))
        step += 1
    return events


def ids(events: list[Any]) -> list[int]:
    return [event.chosen.token_id for event in events]


def alone(loaded: LoadedModel, plan: Plan, **forced: int) -> list[int]:
    """`generate` on the plan's text and prompt."""
    tensor = torch.tensor([[*plan.text, *plan.prompt_ids]])
    output = loaded.model.generate(
        tensor,
        attention_mask=torch.ones_like(tensor),
        max_new_tokens=plan.new,
        do_sample=False,
        eos_token_id=list(EOS),
        pad_token_id=0,
        **forced,
        **plan.params,
    )
    start = 1 if loaded.spec.encoder else tensor.shape[1]
    new: list[int] = output[0, start:].tolist()
    return new


@pytest.fixture(scope="module", params=SHAPES)
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    return model(request.param)


@pytest.mark.parametrize("params", [*GRID, *PROCESSED], ids=str)
def test_as_generate(loaded: LoadedModel, params: dict[str, Any]) -> None:
    plans = [Plan(prompt, params, arrives_at=at) for at, prompt in enumerate(PROMPTS)]
    assert [ids(events) for events in run(loaded, plans)] == [alone(loaded, plan) for plan in plans]


def test_hypotheses_differ_from_greedy_and_end_early(loaded: LoadedModel) -> None:
    found = [ids(events) for events in run(loaded, [Plan(p, GRID[0]) for p in PROMPTS])]
    greedy = [ids(events) for events in run(loaded, [Plan(p) for p in PROMPTS])]
    assert found != greedy
    assert {len(tokens) for tokens in found} != {12}


@pytest.mark.parametrize("forced", [{"forced_bos_token_id": 50}, {"forced_eos_token_id": 5}])
@pytest.mark.parametrize("params", [{}, {"num_beams": 3}], ids=str)
def test_forced_tokens(loaded: LoadedModel, params: dict[str, Any], forced: dict[str, int]) -> None:
    plans = [Plan(prompt, params) for prompt in PROMPTS]
    own = {name.removesuffix("_token_id"): token for name, token in forced.items()}
    found = run(loaded, plans, **own)
    assert [ids(events) for events in found] == [alone(loaded, plan, **forced) for plan in plans]


@pytest.mark.parametrize("params", [{}, {"num_beams": 3}], ids=str)
def test_a_text_whose_end_is_forced_was_ended_by_the_limit(params: dict[str, Any]) -> None:
    plan = Plan(PROMPTS[0], {**params, "min_new_tokens": 11})
    [events] = run(model("bart"), [plan], forced_eos=EOS[0])
    last = events[-1]
    assert isinstance(last, TokenEvent)
    assert (last.chosen.token_id, last.finish_reason) == (EOS[0], FinishReason.LENGTH)


@pytest.mark.parametrize("general", [False, True])
def test_behind_a_prefix_beside_others(general: bool) -> None:
    loaded = model("llama")
    plans = [
        Plan(PROMPTS[1], {"num_beams": 3}, text=(60, 61, 62)),
        Plan(PROMPTS[0], text=(70, 71)),
        Plan(PROMPTS[3], {"num_beams": 2, "length_penalty": 2.0}, arrives_at=2, text=(80,) * 5),
        Plan(PROMPTS[2], arrives_at=3),
        Plan(PROMPTS[2], {"num_beams": SLOTS}, arrives_at=1),
    ]
    assert [ids(events) for events in run(loaded, plans, general=general)] == [
        alone(loaded, plan) for plan in plans
    ]


PLANS = st.builds(
    Plan,
    st.sampled_from(PROMPTS),
    st.sampled_from([{}, *GRID[::5], *PROCESSED]),
    st.integers(0, 8),
    st.none() | st.integers(1, 14),
    st.sampled_from([(), (60, 61)]),
)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(plans=st.lists(PLANS, min_size=1, max_size=7))
def test_arrivals_and_cancellations(plans: list[Plan]) -> None:
    loaded = model("llama")
    for plan, events in zip(plans, run(loaded, plans), strict=True):
        if plan.text and "no_repeat_ngram_size" in plan.params | {"repetition_penalty": 0}:
            continue  # generate counts the text's tokens as said before
        told, expected = ids(events), alone(loaded, plan)
        assert told == expected[: len(told)]
        if plan.cancelled_at is None:
            assert told == expected


def test_events_of_the_best_hypothesis() -> None:
    loaded = model("llama")
    plan = Plan(PROMPTS[0], {"num_beams": 3, "top_logprobs": 2})
    [events] = run(loaded, [plan])
    with torch.inference_mode():
        text = torch.tensor([[*plan.prompt_ids, *ids(events)]])
        logprobs = loaded.model(text).logits[0].log_softmax(-1)[len(plan.prompt_ids) - 1 :]
    for event, row in zip(events, logprobs, strict=False):
        assert isinstance(event, TokenEvent)
        assert event.chosen.logprob == pytest.approx(float(row[event.chosen.token_id]), abs=1e-4)
        assert [top.token_id for top in event.top] == row.topk(2).indices.tolist()
    reasons = [event.finish_reason for event in events if isinstance(event, TokenEvent)]
    ends = events[-1].chosen.token_id in EOS  # type: ignore[union-attr]
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    assert reasons[-1] == (FinishReason.EOS_TOKEN if ends else FinishReason.LENGTH)
    assert events[0].queue_seconds is not None  # type: ignore[union-attr]


@pytest.mark.parametrize("general", [False, True])
def test_a_broken_prefix_takes_nobody_with_it(general: bool) -> None:
    loaded = model("llama")
    huge = torch.full(loaded.spec.shape("decoder", 2), 3e38)
    core = new_core(loaded, special_of(loaded), general=general)
    broken = GenerationRequest("x", PROMPTS[0], SamplingParams(9, num_beams=3))
    core.add(Sequence(broken, Prefix.of(huge, huge, "x")))
    fine = Plan(PROMPTS[1], {"num_beams": 2})
    request = GenerationRequest("y", fine.prompt_ids, SamplingParams(fine.new, **fine.params))
    core.add(Sequence(request, None))
    events = []
    while core.has_work:
        events += core.step().events
    assert [type(event) for name, event in events if name == "x"] == [EngineFailedError]
    assert ids([event for name, event in events if name == "y"]) == alone(loaded, fine)
