"""Log-probabilities of prompts: those that transformers gives the request alone."""

from __future__ import annotations

import pytest
import torch

from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix
from server.engine.core import EngineCore
from server.engine.protocol import (
    EngineFailedError,
    FinishReason,
    GenerationRequest,
    PromptEvent,
    SamplingParams,
    TokenEvent,
)
from server.engine.scheduler import SCORED_TOKENS, Scheduler
from server.engine.sequence import Sequence
from tests.conftest import tiny_model
from tests.engine.reference import as_cache, greedy, random_prefix
from tests.engine.test_core import new_core

SETTINGS = pytest.mark.parametrize("general", [False, True], ids=["chosen", "general"])


@torch.inference_mode()
def expected_scores(
    loaded: LoadedModel, prefix: Prefix | None, prompt_ids: tuple[int, ...]
) -> torch.Tensor:
    """float32 log-probabilities `[prompt - 1, vocab]` of what follows each token of the prompt."""
    cache = None if prefix is None else as_cache(prefix)
    output = loaded.model(torch.tensor([prompt_ids]), past_key_values=cache)
    return output.logits[0, :-1].float().log_softmax(-1)


def submit(
    core: EngineCore,
    name: str,
    prefix: Prefix | None,
    prompt_ids: tuple[int, ...],
    **sampling: int | None,
) -> None:
    core.add(Sequence(GenerationRequest(name, prompt_ids, SamplingParams(**sampling)), prefix))


def finish(core: EngineCore) -> dict[str, list[object]]:
    """Every request's events."""
    found: dict[str, list[object]] = {}
    while core.has_work:
        for name, event in core.step().events:
            found.setdefault(name, []).append(event)
    return found


def check_prompt(
    event: object, loaded: LoadedModel, prefix: Prefix | None, prompt_ids: tuple[int, ...]
) -> None:
    """A prompt's event has transformers' own log-probabilities, in float32 to 1e-4."""
    assert isinstance(event, PromptEvent)
    assert tuple(token.token_id for token in event.tokens) == prompt_ids
    first, *others = event.tokens
    assert first.logprob is None
    assert first.top == ()
    for token, row in zip(others, expected_scores(loaded, prefix, prompt_ids), strict=True):
        assert token.logprob == pytest.approx(float(row[token.token_id]), abs=1e-4)
        best = row.topk(len(token.top))
        assert [one.logprob for one in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert {one.token_id for one in token.top} == set(best.indices.tolist())


@SETTINGS
def test_scores_are_those_of_the_prompt_alone(tiny: LoadedModel, general: bool) -> None:
    # Chunks are 16 tokens: prompts of fewer, as many and more, beside others that are not scored.
    lengths = [(0, 1), (5, 2), (0, 15), (3, 16), (17, 17), (0, 33), (8, 40)]
    core = new_core(tiny, general=general)
    plans: dict[str, tuple[Prefix | None, tuple[int, ...], int, int | None]] = {}
    for number, (prefix_length, prompt_length) in enumerate(lengths):
        prefix = random_prefix(tiny, prefix_length, seed=number) if prefix_length else None
        prompt_ids = tuple(6 + (7 * i + 13 * number) % 90 for i in range(prompt_length))
        for name, new, logprobs in [("none", 0, 3), ("some", 4, 0), ("other", 5, None)]:
            plans[f"{name}-{number}"] = (prefix, prompt_ids, new, logprobs)
    for name, (prefix, prompt_ids, new, logprobs) in plans.items():
        submit(core, name, prefix, prompt_ids, max_new_tokens=new, prompt_logprobs=logprobs)
    found = finish(core)
    for name, (prefix, prompt_ids, new, logprobs) in plans.items():
        events = found[name]
        if logprobs is not None:
            prompt = events.pop(0)
            check_prompt(prompt, tiny, prefix, prompt_ids)
            assert prompt.queue_seconds is not None
            assert prompt.finish_reason == (None if new else FinishReason.LENGTH)
            assert all(len(token.top) == logprobs for token in prompt.tokens[1:])
        expected = greedy(tiny, prefix, prompt_ids, new)[0] if new else []
        assert all(isinstance(event, TokenEvent) for event in events)
        assert [event.chosen.token_id for event in events] == expected
        if events:  # the wait is told once
            assert (events[0].queue_seconds is None) == (logprobs is not None)


def test_the_real_model_scores_exactly(smollm2: LoadedModel) -> None:
    texts = ("The capital of France is Paris.", "name : Cotto | food : Chinese | area : riverside")
    prompts = [tuple(smollm2.tokenizer(text)["input_ids"]) for text in texts]
    prefix = random_prefix(smollm2, 5, seed=5)
    core = new_core(smollm2)
    for name, own in (("alone", None), ("behind a prefix", prefix)):
        for number, prompt in enumerate(prompts):
            submit(core, f"{name}-{number}", own, prompt, max_new_tokens=0, prompt_logprobs=2)
    found = finish(core)
    for number, prompt in enumerate(prompts):
        check_prompt(found[f"alone-{number}"][0], smollm2, None, prompt)
        check_prompt(found[f"behind a prefix-{number}"][0], smollm2, prefix, prompt)


@SETTINGS
def test_a_prefix_without_finite_scores_fails_its_own_request(general: bool) -> None:
    loaded = tiny_model("llama")
    spec = loaded.spec
    huge = torch.full((spec.num_layers, spec.num_kv_heads, 4, spec.head_dim), 3e38)
    poison = Prefix.of(huge, huge, method="poison")
    core = new_core(loaded, general=general)
    submit(core, "bad", poison, tuple(range(6, 40)), max_new_tokens=3, prompt_logprobs=0)
    submit(core, "good", None, (9, 10, 11), max_new_tokens=3, prompt_logprobs=0)
    found = finish(core)
    assert [type(event) for event in found["bad"]] == [EngineFailedError]
    check_prompt(found["good"][0], loaded, None, (9, 10, 11))
    expected, _ = greedy(loaded, None, (9, 10, 11), 3)
    assert [event.chosen.token_id for event in found["good"][1:]] == expected


def test_a_search_for_beams_tells_its_prompt_first(tiny_llama: LoadedModel) -> None:
    core = new_core(tiny_llama)
    prompt_ids = tuple(range(6, 30))
    submit(core, "beams", None, prompt_ids, max_new_tokens=3, prompt_logprobs=1, num_beams=2)
    first, *others = finish(core)["beams"]
    check_prompt(first, tiny_llama, None, prompt_ids)
    assert all(isinstance(event, TokenEvent) for event in others)


def test_a_prompt_that_loses_its_slot_is_scored_once(tiny_llama: LoadedModel) -> None:
    core = new_core(tiny_llama)
    prompts = {name: tuple(range(6 + i, 66 + i)) for i, name in enumerate(("some", "more", "none"))}
    for name, prompt_ids in prompts.items():
        sampling = SamplingParams(0 if name == "none" else 9, prompt_logprobs=2, ignore_eos=True)
        request = GenerationRequest(name, prompt_ids, sampling, tenant="patient", priority=-1)
        core.add(Sequence(request, None))
    found: dict[str, list[object]] = {name: [] for name in prompts}
    preempted = step = 0
    while core.has_work:
        if step % 3 == 1 and step < 20:  # within the prompts, and behind some
            request = GenerationRequest(f"urgent-{step}", (6, 7), SamplingParams(1))
            core.add(Sequence(request, None))
        result = core.step()
        preempted += result.stats.preempted
        for name, event in result.events:
            found.setdefault(name, []).append(event)
        step += 1
    assert preempted > 1
    for name, prompt_ids in prompts.items():
        prompt, *tokens = found[name]
        check_prompt(prompt, tiny_llama, None, prompt_ids)
        assert all(isinstance(event, TokenEvent) for event in tokens)
        assert len(tokens) == (0 if name == "none" else 9)


def test_a_cancelled_request_leaves_no_score_behind(tiny_llama: LoadedModel) -> None:
    core = new_core(tiny_llama)
    submit(core, "gone", None, tuple(range(6, 60)), max_new_tokens=0, prompt_logprobs=0)
    core.step()
    core.cancel("gone")
    submit(core, "next", None, (9, 10, 11), max_new_tokens=0, prompt_logprobs=0)
    found = finish(core)
    assert list(found) == ["next"]
    check_prompt(found["next"][0], tiny_llama, None, (9, 10, 11))


def test_few_scored_tokens_go_into_one_step() -> None:
    scheduler = Scheduler(max_slots=4, prefill_tokens=4 * SCORED_TOKENS)
    for number, scores in enumerate((0, 0, None)):
        params = SamplingParams(1, prompt_logprobs=scores)
        request = GenerationRequest(str(number), (7,) * SCORED_TOKENS * 2, params)
        scheduler.add(Sequence(request, None))
    scheduler.admit()
    spans = sorted(scheduler.plan(), key=lambda span: span.sequence.request.request_id)
    assert [(span.sequence.request.request_id, len(span.token_ids)) for span in spans] == [
        ("0", SCORED_TOKENS),
        ("2", 2 * SCORED_TOKENS),
    ]
    assert [span.num_logits for span in spans] == [SCORED_TOKENS, 1]
