"""The exactness contract: whatever else runs, a request's tokens are those it has alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import AutoModelForCausalLM, GraniteConfig

from prefix_store.base_model import BaseModelSpec
from prefix_store.errors import ModelLoadError
from prefix_store.model_loading import DEFAULT_MODEL, LoadedModel, load_base_model
from prefix_store.prefix import Prefix
from server.engine import static_decode
from server.engine.choose_runner import choose_runner
from server.engine.core import EngineCore
from server.engine.packed_runner import PackedRunner
from server.engine.protocol import (
    EngineConfig,
    EngineFailedError,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    TokenEvent,
)
from server.engine.runner import Runner, TransformersRunner
from server.engine.scheduler import Span
from server.engine.sequence import Sequence
from server.engine.special_tokens import SpecialTokens
from tests.conftest import tiny_model
from tests.engine.reference import greedy, random_prefix

CONFIG = EngineConfig(max_slots=3, max_length=80, prefill_tokens=16)


@dataclass(frozen=True)
class Plan:
    """A request, the step before which it arrives, and the tokens after which it is cancelled."""

    prefix_length: int
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    arrives_at: int = 0
    cancelled_at: int | None = None
    sampling: dict[str, float | int | bool] = field(default_factory=dict)
    tenant: str = ""
    priority: int = 0

    def sequence(self, loaded: LoadedModel, index: int) -> Sequence:
        params = SamplingParams(max_new_tokens=self.max_new_tokens, **self.sampling)
        request = GenerationRequest(
            str(index), self.prompt_ids, params, tenant=self.tenant, priority=self.priority
        )
        return Sequence(request, self.prefix(loaded))

    def prefix(self, loaded: LoadedModel) -> Prefix | None:
        if self.prefix_length == 0:
            return None
        return random_prefix(loaded, self.prefix_length, seed=self.prefix_length)


def new_core(
    loaded: LoadedModel, *, general: bool = False, static: bool = False, int8: bool = False
) -> EngineCore:
    """A core on the runner the engine would choose, or on the general one."""
    runner: Runner
    if static:
        runner = replayed_runner(loaded)
    elif general:
        runner = TransformersRunner(loaded, 3, 80)
    else:
        runner = choose_runner(loaded, 3, 80, int8=int8)
    return EngineCore(runner, CONFIG, SpecialTokens.of(loaded))


_replayed: dict[str, Runner] = {}


def replayed_runner(loaded: LoadedModel) -> Runner:
    """A general runner whose steps are captured and replayed, made once for each model."""
    name = loaded.spec.name
    if name not in _replayed:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(static_decode, "_SHORTEST", 32)
            _replayed[name] = TransformersRunner(loaded, 3, 80, capture=captured)
    return _replayed[name]


def captured(step: static_decode.Step) -> static_decode.Step:
    """A CUDA graph's rules on a CPU: the operations on tensors are kept, all else is frozen."""
    traced: static_decode.Step = make_fx(step)()
    return traced


def run(
    loaded: LoadedModel,
    plans: list[Plan],
    *,
    general: bool = False,
    static: bool = False,
    int8: bool = False,
) -> list[list[TokenEvent]]:
    """Every plan's events, with arrivals and cancellations at their steps."""
    core = new_core(loaded, general=general, static=static, int8=int8)
    events: list[list[TokenEvent]] = [[] for _ in plans]
    step = 0
    while core.has_work or any(plan.arrives_at >= step for plan in plans):
        for index, plan in enumerate(plans):
            if plan.arrives_at == step:
                core.add(plan.sequence(loaded, index))
        for request_id, event in core.step().events:
            assert isinstance(event, TokenEvent), event
            events[int(request_id)].append(event)
        for index, plan in enumerate(plans):
            if plan.cancelled_at is not None and len(events[index]) >= plan.cancelled_at:
                core.cancel(str(index))
        step += 1
    assert core.stats.running == core.stats.waiting == 0
    return events


def token_ids(events: list[TokenEvent]) -> list[int]:
    return [event.chosen.token_id for event in events]


plans_strategy = st.lists(
    st.builds(
        Plan,
        prefix_length=st.sampled_from([0, 0, 1, 3, 8, 17]),
        prompt_ids=st.lists(st.integers(6, 96), min_size=1, max_size=40).map(tuple),
        max_new_tokens=st.integers(1, 12),
        arrives_at=st.integers(0, 8),
        cancelled_at=st.none() | st.integers(1, 6),
        tenant=st.sampled_from("aab"),
        priority=st.sampled_from([0, 0, -1]),
    ),
    min_size=1,
    max_size=7,
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(plans=plans_strategy)
def test_greedy_tokens_are_those_of_the_request_alone(tiny: LoadedModel, plans: list[Plan]) -> None:
    check_greedy(tiny, plans, run(tiny, plans))


@settings(max_examples=15, deadline=None)
@given(plans=plans_strategy)
def test_the_general_runner_serves_what_the_fast_one_does(
    tiny_llama: LoadedModel, plans: list[Plan]
) -> None:
    check_greedy(tiny_llama, plans, run(tiny_llama, plans, general=True))


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(plans=plans_strategy)
def test_captured_steps_give_the_same_tokens(tiny: LoadedModel, plans: list[Plan]) -> None:
    check_greedy(tiny, plans, run(tiny, plans, static=True))


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("shape", ["llama", "qwen2"])
@pytest.mark.parametrize("length", [47, 48, 55])
def test_rows_that_read_a_long_prefix_together(shape: str, length: int) -> None:
    loaded = tiny_model(shape)
    prefix = random_prefix(loaded, length, seed=length)
    prompts = [(9, 10, 11), (20, 21), tuple(range(30, 45))]
    core = new_core(loaded)
    for index, prompt in enumerate(prompts):
        request = GenerationRequest(str(index), prompt, SamplingParams(max_new_tokens=8))
        core.add(Sequence(request, prefix))
    found: list[list[int]] = [[] for _ in prompts]
    while core.has_work:
        for request_id, event in core.step().events:
            assert isinstance(event, TokenEvent), event
            found[int(request_id)].append(event.chosen.token_id)
    assert found == [greedy(loaded, prefix, prompt, 8)[0] for prompt in prompts]


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("shape", ["llama", "qwen2"])
def test_rows_that_read_a_long_prompt_together(shape: str) -> None:
    loaded = tiny_model(shape)
    prompt = tuple(6 + (7 * i) % 90 for i in range(66))
    check_greedy(
        loaded, plans := [Plan(3, prompt, 8), Plan(0, prompt[::-1], 8)], run(loaded, plans)
    )


def test_int8_stays_near_the_model_alone_and_in_a_batch(smollm2: LoadedModel) -> None:
    runner = choose_runner(smollm2, 3, 80, int8=True)
    texts = ("The quick brown fox jumps over", "Once upon a time", "name[The Eagle], food[French]")
    prompts = [tuple(smollm2.tokenizer(text)["input_ids"]) for text in texts]
    for prompt, found in zip(prompts, forward(runner, prompts), strict=True):
        alone = forward(runner, [prompt])[0]
        expected = forward(choose_runner(smollm2, 1, 80), [prompt])[0]
        # Sums are rounded differently in a batch, and 8 bits turn some of that into a step.
        assert (found - alone).norm() < 0.1 * expected.norm()
        assert (found - expected).norm() < 0.25 * expected.norm()


def forward(runner: Runner, prompts: list[tuple[int, ...]]) -> torch.Tensor:
    """Logits after each prompt, computed in one step."""
    spans = []
    for slot, prompt in enumerate(prompts):
        request = GenerationRequest(str(slot), prompt, SamplingParams(1))
        spans.append(Span(Sequence(request, None, slot=slot), 0, prompt))
    with torch.inference_mode():
        return runner.forward(spans).float()


def test_int8_is_refused_where_only_the_general_runner_serves() -> None:
    with pytest.raises(ModelLoadError, match="start without --quantize"):
        choose_runner(tiny_model("gpt2"), 2, 16, int8=True)


def check_greedy(loaded: LoadedModel, plans: list[Plan], found: list[list[TokenEvent]]) -> None:
    """Tokens and finish reasons are those of `generate`, up to the cancellation."""
    for plan, events in zip(plans, found, strict=True):
        expected, _ = greedy(loaded, plan.prefix(loaded), plan.prompt_ids, plan.max_new_tokens)
        if plan.cancelled_at is not None:
            assert token_ids(events) == expected[: len(events)]
            continue
        assert token_ids(events) == expected
        stopped = expected[-1] in SpecialTokens.of(loaded).eos
        reason = FinishReason.EOS_TOKEN if stopped else FinishReason.LENGTH
        assert [e.finish_reason for e in events] == [None] * (len(events) - 1) + [reason]


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize(
    ("ignore_eos", "reasons"),
    [(False, [FinishReason.EOS_TOKEN]), (True, [None, None, FinishReason.LENGTH])],
)
def test_the_end_of_a_text_can_be_ignored(
    tiny_llama: LoadedModel,
    ignore_eos: bool,
    reasons: list[FinishReason | None],
    num_beams: int,
) -> None:
    every_token = frozenset(range(tiny_llama.model.config.vocab_size))
    core = EngineCore(choose_runner(tiny_llama, 3, 80), CONFIG, SpecialTokens(every_token))
    sampling = {"ignore_eos": ignore_eos, "num_beams": num_beams}
    plan = Plan(0, (7, 8, 9), max_new_tokens=3, sampling=sampling)
    core.add(plan.sequence(tiny_llama, 0))
    events = []
    while core.has_work:
        events += [event for _, event in core.step().events]
    assert [event.finish_reason for event in events] == reasons


@pytest.mark.usefixtures("loops")
def test_fast_paths_are_chosen_by_structure(tiny: LoadedModel) -> None:
    expected = tiny.model.config.model_type in {"llama", "qwen2"}
    assert isinstance(choose_runner(tiny, 2, 16), PackedRunner) is expected


def test_the_real_model_runs_fast_in_both_dtypes(smollm2: LoadedModel, models_dir: Path) -> None:
    assert isinstance(choose_runner(smollm2, 2, 64), PackedRunner)
    device, dtype = torch.device("cpu"), torch.bfloat16
    half = load_base_model(DEFAULT_MODEL, device=device, dtype=dtype, cache_dir=models_dir)
    assert isinstance(choose_runner(half, 2, 64), PackedRunner)


def test_a_model_that_only_looks_like_llama_keeps_the_general_runner() -> None:
    # Granite has Llama's modules and scales its embeddings and residuals besides.
    config = GraniteConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=97,
        embedding_multiplier=3.0,
        residual_multiplier=0.3,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    loaded = LoadedModel(model, tokenizer=None, spec=BaseModelSpec.from_model(model, "granite"))
    assert isinstance(choose_runner(loaded, 2, 16), TransformersRunner)


def test_logprobs_agree_with_the_request_alone(tiny: LoadedModel) -> None:
    plans = [
        Plan(length, tuple(range(6, 6 + prompt)), 6, sampling={"top_logprobs": 97})
        for length, prompt in [(0, 3), (5, 30), (17, 1), (1, 19)]
    ]
    for plan, events in zip(plans, run(tiny, plans), strict=True):
        _, logits = greedy(tiny, plan.prefix(tiny), plan.prompt_ids, plan.max_new_tokens)
        for event, row in zip(events, logits.log_softmax(-1), strict=True):
            top = {t.token_id: t.logprob for t in event.top}
            found = torch.tensor([top[i] for i in range(len(row))])
            assert torch.allclose(found, row, atol=1e-4)
            assert event.chosen.logprob == pytest.approx(
                float(row[event.chosen.token_id]), abs=1e-4
            )


def test_a_seeded_sample_does_not_depend_on_its_batch(tiny: LoadedModel) -> None:
    sampling = {"do_sample": True, "temperature": 1.3, "top_p": 0.9, "seed": 42}
    sampled = Plan(8, (9, 10, 11), 12, sampling=sampling)
    alone = token_ids(run(tiny, [sampled])[0])
    others = [Plan(3, tuple(range(6, 40)), 9), Plan(0, (7,), 12, sampling={"do_sample": True})]
    crowded = Plan(8, (9, 10, 11), 12, arrives_at=2, sampling=sampling)
    assert token_ids(run(tiny, [*others, crowded])[2]) == alone
    other_seed = Plan(8, (9, 10, 11), 12, sampling={**sampling, "seed": 43})
    assert token_ids(run(tiny, [other_seed])[0]) != alone


def test_a_request_that_loses_its_slot_goes_on_with_the_tokens_it_has_alone(
    tiny: LoadedModel,
) -> None:
    greedily: dict[str, float | int | bool] = {"ignore_eos": True}
    sampled = {**greedily, "do_sample": True, "repetition_penalty": 1.2, "seed": 42}
    batch = [
        Plan(8, (9, 10, 11), 12, sampling=greedily, priority=-1),
        Plan(0, tuple(range(6, 46)), 12, sampling=greedily, priority=-1),
        Plan(3, (7, 8), 12, sampling=sampled, priority=-1),
    ]
    alone = [token_ids(run(tiny, [plan])[0]) for plan in batch]
    core = new_core(tiny)
    told: dict[str, list[int]] = {str(i): [] for i in range(8)}
    for index, plan in enumerate(batch):
        core.add(plan.sequence(tiny, index))
    preempted = step = 0
    while core.has_work:
        if step % 3 == 1 and step < 15:
            core.add(Plan(17, (6, 7), 2, sampling=greedily).sequence(tiny, 3 + step // 3))
        result = core.step()
        preempted += result.stats.preempted
        for request_id, event in result.events:
            assert isinstance(event, TokenEvent), event
            told[request_id].append(event.chosen.token_id)
        step += 1
    assert preempted == 4
    assert [told[str(index)] for index in range(3)] == alone


def test_repetition_penalty_equals_transformers(tiny: LoadedModel) -> None:
    prompt = (9, 10, 11, 12, 9)
    plan = Plan(0, prompt, 12, sampling={"repetition_penalty": 1.7})
    crowd = Plan(17, tuple(range(6, 30)), 12)
    expected = tiny.model.generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, repetition_penalty=1.7
    )[0, len(prompt) :]
    assert token_ids(run(tiny, [crowd, plan])[1]) == expected.tolist()


def test_a_long_prompt_does_not_stall_those_that_decode(tiny_llama: LoadedModel) -> None:
    core = new_core(tiny_llama)
    core.add(Plan(0, (6, 7), 30).sequence(tiny_llama, 0))
    core.step()
    core.add(Plan(3, tuple(range(6, 66)), 2).sequence(tiny_llama, 1))
    for _ in range(3):  # 60 prompt tokens, 16 a step: the first three steps cannot finish them
        assert [request_id for request_id, _ in core.step().events] == ["0"]


@pytest.mark.parametrize("general", [False, True])
def test_a_poisoned_prefix_fails_its_own_request_only(
    tiny_llama: LoadedModel, general: bool
) -> None:
    core = new_core(tiny_llama, general=general)
    spec = tiny_llama.spec
    huge = torch.full((spec.num_layers, spec.num_kv_heads, 4, spec.head_dim), 3e38)
    poison = Sequence(
        GenerationRequest("bad", (6, 7, 8), SamplingParams(max_new_tokens=4)),
        Prefix.of(huge, huge, method="poison"),
    )
    neighbour = Plan(0, (9, 10), 8)
    core.add(neighbour.sequence(tiny_llama, 0))
    core.add(poison)
    after = Plan(0, (11, 12), 8)
    seen: dict[str, list[object]] = {"0": [], "1": [], "bad": []}
    for step in range(20):
        if step == 3:
            core.add(after.sequence(tiny_llama, 1))  # takes the poisoned slot
        for request_id, event in core.step().events:
            seen[request_id].append(event)
    assert [type(event) for event in seen["bad"]] == [EngineFailedError]
    for plan, index in [(neighbour, "0"), (after, "1")]:
        expected, _ = greedy(tiny_llama, None, plan.prompt_ids, plan.max_new_tokens)
        assert token_ids(seen[index]) == expected  # type: ignore[arg-type]


def test_real_model_mixes_tasks_exactly(smollm2: LoadedModel) -> None:
    prompts = ["The capital of France is", "name : Cotto | food : Chinese", "Once upon a time"]
    plans = [
        Plan(length, tuple(smollm2.tokenizer(text)["input_ids"]), 8, arrives_at=arrival)
        for arrival, (length, text) in enumerate(zip([0, 16, 5], prompts, strict=True))
    ]
    for plan, events in zip(plans, run(smollm2, plans), strict=True):
        expected, _ = greedy(smollm2, plan.prefix(smollm2), plan.prompt_ids, plan.max_new_tokens)
        assert token_ids(events) == expected
