"""Encoder-decoder models: whatever else runs, a request's tokens are those it has alone."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from prefix_store.errors import ModelLoadError
from prefix_store.groups import GROUPS, Group
from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix
from server.engine.choose_runner import choose_runner
from server.engine.core import EngineCore
from server.engine.encoder_decoder import EncoderDecoderRunner
from server.engine.protocol import EngineConfig, GenerationRequest, SamplingParams
from server.engine.scheduler import Span
from server.engine.sequence import Sequence
from server.engine.special_tokens import SpecialTokens
from tests.engine.seq2seq_reference import greedy, random_groups

MAX_LENGTH = 60
CONFIG = EngineConfig(max_slots=3, max_length=MAX_LENGTH, prefill_tokens=16)
EVERY_CHOICE = tuple(
    tuple(group for group, there in zip(GROUPS, choice, strict=True) if there)
    for choice in product((False, True), repeat=len(GROUPS))
)


@dataclass(frozen=True)
class Plan:
    """A request, the step before which it arrives, and the step before which it is cancelled."""

    groups: tuple[Group, ...]
    prefix_length: int
    source_ids: tuple[int, ...]
    max_new_tokens: int
    arrives_at: int = 0
    cancelled_at: int | None = None
    priority: int = 0

    def prefix(self, loaded: LoadedModel) -> Prefix | None:
        if not self.groups:
            return None
        return random_groups(loaded, self.groups, self.prefix_length, seed=self.prefix_length)

    def sequence(self, loaded: LoadedModel, index: int) -> Sequence:
        params = SamplingParams(max_new_tokens=self.max_new_tokens)
        request = GenerationRequest(str(index), self.source_ids, params, priority=self.priority)
        return Sequence(request, self.prefix(loaded), decoder_ids(loaded))


def decoder_ids(loaded: LoadedModel) -> tuple[int, ...]:
    start = SpecialTokens.of(loaded).decoder_start
    assert start is not None
    return (start,)


def run(loaded: LoadedModel, plans: list[Plan]) -> list[list[int]]:
    """Every plan's tokens, with arrivals and cancellations at their steps."""
    core = EngineCore(choose_runner(loaded, 3, MAX_LENGTH), CONFIG, SpecialTokens.of(loaded))
    tokens: list[list[int]] = [[] for _ in plans]
    step = 0
    while core.has_work or any(plan.arrives_at >= step for plan in plans):
        for index, plan in enumerate(plans):
            if plan.arrives_at == step:
                core.add(plan.sequence(loaded, index))
            if plan.cancelled_at == step:
                core.cancel(str(index))
        for request_id, event in core.step().events:
            tokens[int(request_id)].append(event.chosen.token_id)
        step += 1
    return tokens


def expected(loaded: LoadedModel, plan: Plan) -> list[int]:
    return greedy(loaded, plan.prefix(loaded), plan.source_ids, plan.max_new_tokens)[0]


def test_mixed_batches_of_every_choice_of_groups(tiny_seq2seq: LoadedModel) -> None:
    plans = [
        Plan(groups, 3 + index, tuple(range(7, 9 + 5 * index)), 9, arrives_at=index // 3)
        for index, groups in enumerate(EVERY_CHOICE)
    ]
    told = run(tiny_seq2seq, plans)
    assert told == [expected(tiny_seq2seq, plan) for plan in plans]
    assert len({tuple(tokens) for tokens in told}) > 4  # they do not all say the same


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_arrivals_lengths_and_cancellations(tiny_seq2seq: LoadedModel, data: st.DataObject) -> None:
    ids = st.lists(st.integers(6, 96), min_size=1, max_size=30).map(tuple)
    plan = st.builds(
        Plan,
        st.sampled_from(EVERY_CHOICE),
        st.integers(1, 9),
        ids,
        st.integers(1, 12),
        st.integers(0, 6),
        st.none() | st.integers(1, 12),
        st.sampled_from([0, -1]),
    )
    plans = data.draw(st.lists(plan, min_size=1, max_size=7))
    for plan, told in zip(plans, run(tiny_seq2seq, plans), strict=True):
        alone = expected(tiny_seq2seq, plan)
        assert told == alone[: len(told)]
        if plan.cancelled_at is None:
            assert told == alone


def test_a_request_that_loses_its_slot_goes_on_with_the_tokens_it_has_alone(
    tiny_seq2seq: LoadedModel,
) -> None:
    batch = [
        Plan(groups, 4, tuple(range(7, 20 + index)), 12, priority=-1)
        for index, groups in enumerate((EVERY_CHOICE[-1], EVERY_CHOICE[0], EVERY_CHOICE[3]))
    ]
    others = [Plan((), 0, (9, 10), 2, arrives_at=step) for step in (2, 2, 2, 5, 8)]
    told = run(tiny_seq2seq, [*batch, *others])
    assert told == [expected(tiny_seq2seq, plan) for plan in (*batch, *others)]


def test_logits_agree(tiny_seq2seq: LoadedModel) -> None:
    loaded = tiny_seq2seq
    runner = EncoderDecoderRunner(loaded, 8, MAX_LENGTH)
    plans = [
        Plan(groups, 2 + i, tuple(range(6, 12 + 3 * i)), 6) for i, groups in enumerate(EVERY_CHOICE)
    ]
    sequences = [plan.sequence(loaded, index) for index, plan in enumerate(plans)]
    for slot, sequence in enumerate(sequences):
        sequence.slot, sequence.length = slot, sequence.prefix_length
        with torch.inference_mode():
            runner.start(sequence)
    references = [greedy(loaded, plan.prefix(loaded), plan.source_ids, 6) for plan in plans]
    for step in range(min(len(tokens) for tokens, _ in references)):
        spans = []
        for sequence, (tokens, _) in zip(sequences, references, strict=True):
            token = tokens[step - 1] if step else decoder_ids(loaded)[0]
            spans.append(Span(sequence, sequence.length, (token,)))
        with torch.inference_mode():
            logits = runner.forward(spans)
        for sequence, found, (_, wanted) in zip(sequences, logits, references, strict=True):
            torch.testing.assert_close(found, wanted[step], atol=1e-4, rtol=1e-4)
            sequence.length += 1


def test_without_a_prefix_as_generate(tiny_seq2seq: LoadedModel) -> None:
    plan = Plan((), 0, tuple(range(10, 25)), 12)
    [told] = run(tiny_seq2seq, [plan])
    ids = tiny_seq2seq.model.generate(
        torch.tensor([plan.source_ids]), max_new_tokens=12, do_sample=False
    )
    assert told == ids[0, 1:].tolist()


def test_a_model_without_a_start_token(tiny_seq2seq: LoadedModel) -> None:
    model = tiny_seq2seq.model
    configs = (model.config, model.generation_config)
    before = [config.decoder_start_token_id for config in configs]
    try:
        for config in configs:
            config.decoder_start_token_id = None
        with pytest.raises(ModelLoadError, match="decoder_start_token_id"):
            SpecialTokens.of(tiny_seq2seq)
    finally:
        for config, token_id in zip(configs, before, strict=True):
            config.decoder_start_token_id = token_id
