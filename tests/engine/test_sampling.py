"""Sampling against transformers' own logits processors, row by row."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from server.engine.protocol import GenerationRequest, SamplingParams
from server.engine.sampling import draw, filter_logits, sample
from server.engine.sequence import Sequence
from server.engine.special_tokens import SpecialTokens

VOCAB = 50


def sequence(params: SamplingParams, output_ids: tuple[int, ...] = ()) -> Sequence:
    result = Sequence(GenerationRequest("r", (1, 2, 3), params), prefix=None)
    result.output_ids.extend(output_ids)
    return result


def logits(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def warped(scores: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """What transformers makes of one row, in `generate`'s order."""
    warpers = LogitsProcessorList()
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        warpers.append(MinPLogitsWarper(params.min_p))
    if params.typical_p < 1:
        warpers.append(TypicalLogitsWarper(params.typical_p))
    return warpers(torch.zeros(1, 1, dtype=torch.int64), scores[None])[0]


params_strategy = st.builds(
    SamplingParams,
    max_new_tokens=st.just(1),
    do_sample=st.just(True),
    top_k=st.integers(0, VOCAB + 5),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    typical_p=st.sampled_from([1.0, 0.9, 0.2]),
)


@settings(deadline=None)
@example(params=[SamplingParams(1, do_sample=True)] * 2, seed=0)  # a sum that rounds up to 1
@given(params=st.lists(params_strategy, min_size=1, max_size=6), seed=st.integers(0, 10_000))
def test_filters_keep_what_transformers_keeps(params: list[SamplingParams], seed: int) -> None:
    scores = logits(len(params), seed)
    found = filter_logits(scores, params)
    for row, (param, kept) in enumerate(zip(params, found, strict=True)):
        assert torch.equal(kept, warped(scores[row], param))


def test_draws_follow_the_distribution() -> None:
    scores = logits(1, seed=3)
    params = SamplingParams(1, do_sample=True, temperature=0.7, top_k=5)
    count = 20_000
    # Evenly spread numbers invert to each token as often as its probability says, to 1 in count.
    uniforms = (torch.arange(count) + 0.5) / count
    drawn = draw(scores.expand(count, -1), [params] * count, uniforms)
    tempered = TemperatureLogitsWarper(0.7)(torch.zeros(1, 1), scores)
    expected = warped(tempered[0], params).softmax(-1)
    frequency = drawn.bincount(minlength=VOCAB) / count
    assert torch.allclose(frequency, expected, atol=2 / count)


@pytest.mark.parametrize("uniform", [0.0, math.nextafter(1.0, 0.0)])
def test_the_ends_of_the_unit_interval_draw_kept_tokens(uniform: float) -> None:
    scores = logits(1, seed=5)
    params = SamplingParams(1, do_sample=True, top_k=2)
    token_id = draw(scores, [params], torch.tensor([uniform], dtype=torch.float64)).item()
    assert token_id in scores[0].topk(2).indices.tolist()


def test_repetition_penalty_covers_prompt_and_output() -> None:
    scores = logits(2, seed=8)
    params = SamplingParams(1, repetition_penalty=1.8)
    seen = torch.tensor([[1, 2, 3, 9, 9]])
    expected = RepetitionPenaltyLogitsProcessor(1.8)(seen, scores[1:].clone()).argmax().item()
    plain = sequence(SamplingParams(1))
    chosen = sample(scores.clone(), [plain, sequence(params, (9, 9))], SpecialTokens())
    assert chosen[1] is not None
    assert chosen[1].chosen.token_id == expected
    assert chosen[0] is not None
    assert chosen[0].chosen.token_id == scores[0].argmax().item()


def test_frequency_penalty_grows_with_each_repetition() -> None:
    scores = torch.zeros(1, VOCAB)
    scores[0, 7], scores[0, 8] = 2.0, 1.0
    params = SamplingParams(1, frequency_penalty=0.4)
    choices = []
    for repeats in range(5):
        chosen = sample(scores.clone(), [sequence(params, (7,) * repeats)], SpecialTokens())[0]
        assert chosen is not None
        choices.append(chosen.chosen.token_id)
    assert choices == [7, 7, 7, 8, 8]  # 2.0 - 3 x 0.4 < 1.0


def test_logprobs_are_the_models_own() -> None:
    scores = logits(1, seed=9)
    params = SamplingParams(1, repetition_penalty=5.0, top_logprobs=3)
    chosen = sample(scores.clone(), [sequence(params, (int(scores.argmax()),))], SpecialTokens())[0]
    assert chosen is not None
    expected = scores.log_softmax(-1)[0]
    assert chosen.chosen.logprob == pytest.approx(float(expected[chosen.chosen.token_id]), abs=1e-5)
    assert [t.token_id for t in chosen.top] == scores[0].topk(3).indices.tolist()
    assert [t.logprob for t in chosen.top] == pytest.approx(expected.topk(3).values.tolist())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "params", [SamplingParams(1), SamplingParams(1, do_sample=True, top_p=0.5)]
)
def test_a_row_that_is_not_finite_has_no_sample(bad: float, params: SamplingParams) -> None:
    scores = logits(2, seed=4)
    scores[0, 3] = bad
    first, second = sample(scores, [sequence(params), sequence(params)], SpecialTokens())
    assert first is None
    assert second is not None
