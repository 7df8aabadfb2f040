"""Generation under a grammar: exact, valid, and without a trace in the rows beside it."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from tokenizers import Tokenizer, models
from transformers import DynamicCache, PreTrainedTokenizerFast

from prefix_store.model_loading import LoadedModel, load_base_model
from server.engine.choose_runner import choose_runner
from server.engine.core import EngineCore
from server.engine.grammar import GrammarCompiler, TokenGrammar, llguidance_grammar
from server.engine.protocol import (
    EngineConfig,
    FinishReason,
    GenerationRequest,
    Grammar,
    GrammarFailedError,
    InvalidGrammarError,
    SamplingParams,
    TokenEvent,
)
from server.engine.runner import Runner
from server.engine.sequence import Sequence
from server.engine.special_tokens import SpecialTokens
from tests.engine.reference import greedy

SLOTS, LENGTH, NEW = 8, 160, 48
RESTAURANT = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "area": {"enum": ["riverside", "city centre"]},
        "rating": {"type": "integer", "minimum": 1, "maximum": 5},
    },
    "required": ["name", "area", "rating"],
    "additionalProperties": False,
}
GRAMMARS = [
    Grammar("json_schema", json.dumps(RESTAURANT)),
    Grammar("regex", r"[0-9]{3}-(?:[A-F]|é){2,4}"),
    Grammar("choice", json.dumps(["positive", "negative/\\d", "positively\nnot . 東京"])),
    Grammar("json_object"),
]


@dataclass(frozen=True)
class Writer:
    """A tiny model with the real tokenizer, and what it takes to run it."""

    loaded: LoadedModel
    runner: Runner
    compiler: GrammarCompiler

    def compiled(self, grammar: Grammar) -> TokenGrammar:
        return asyncio.run(self.compiler.compile(grammar))

    def core(self, special: SpecialTokens | None = None) -> EngineCore:
        config = EngineConfig(max_slots=SLOTS, max_length=LENGTH, prefill_tokens=16)
        return EngineCore(self.runner, config, special or SpecialTokens.of(self.loaded))

    def run(self, requests: list[GenerationRequest]) -> dict[str, list[Any]]:
        """Every request's events, by its id."""
        core = self.core()
        events: dict[str, list[Any]] = {request.request_id: [] for request in requests}
        for request in requests:
            core.add(Sequence(request, None))
        while core.has_work:
            for request_id, event in core.step().events:
                events[request_id].append(event)
        return events

    def text(self, events: list[TokenEvent]) -> str:
        ids = [event.chosen.token_id for event in events]
        text: str = self.loaded.tokenizer.decode(ids, skip_special_tokens=True)
        return text


@pytest.fixture(scope="module")
def writer(tiny_llama_dir: Path) -> Writer:
    device, dtype = torch.device("cpu"), torch.float32
    loaded = load_base_model(
        str(tiny_llama_dir), device=device, dtype=dtype, cache_dir=tiny_llama_dir
    )
    runner = choose_runner(loaded, SLOTS, LENGTH)
    return Writer(loaded, runner, GrammarCompiler(loaded, SpecialTokens.of(loaded).eos))


@cache
def tokens_of(tokenizer: Any) -> LLTokenizer:
    """What the library makes of a tokenizer, which takes it seconds."""
    return from_tokenizer(tokenizer)


@torch.inference_mode()
def guided(loaded: LoadedModel, prompt: tuple[int, ...], grammar: Grammar, new: int) -> list[int]:
    """The model on this text alone; of the tokens that the library allows, the likeliest."""
    matcher = LLMatcher(tokens_of(loaded.tokenizer), llguidance_grammar(grammar))
    output: list[int] = []
    cache = DynamicCache()
    while len(output) < new and not matcher.is_stopped():
        ids = torch.tensor([output[-1:] or prompt])
        logits = loaded.model(ids, past_key_values=cache).logits[0, -1]
        allowed = torch.frombuffer(bytearray(matcher.compute_logit_bias()), dtype=torch.uint8) > 0
        output.append(int(logits.masked_fill(~allowed, -torch.inf).argmax()))
        assert matcher.consume_token(output[-1])
    return output


def ids_of(events: list[TokenEvent]) -> list[int]:
    return [event.chosen.token_id for event in events]


def check_plain(writer: Writer, request: GenerationRequest, events: list[TokenEvent]) -> None:
    """A row without a grammar is that of `generate` alone."""
    new = request.sampling.max_new_tokens
    assert ids_of(events) == greedy(writer.loaded, None, request.prompt_ids, new)[0]


def test_greedy_tokens_are_the_likeliest_that_the_grammar_allows(writer: Writer) -> None:
    prompts = [(40, 41, 42), (900, 7), (123, 456, 789, 1000)]
    params = SamplingParams(NEW)
    requests = [
        GenerationRequest(f"{n}-{m}", prompt, params, grammar=writer.compiled(grammar))
        for n, grammar in enumerate(GRAMMARS)
        for m, prompt in enumerate(prompts)
    ]
    plain = [GenerationRequest(f"plain-{m}", prompt, params) for m, prompt in enumerate(prompts)]
    mixed = [
        request for group in zip(*[iter(requests)] * 4, plain, strict=True) for request in group
    ]
    events = writer.run(mixed)
    for request in requests:
        grammar = GRAMMARS[int(request.request_id[0])]
        expected = guided(writer.loaded, request.prompt_ids, grammar, NEW)
        assert ids_of(events[request.request_id]) == expected, grammar
    for request in plain:
        check_plain(writer, request, events[request.request_id])


leaves = st.sampled_from(
    [
        {"type": "integer", "minimum": -3, "maximum": 120},
        {"type": "boolean"},
        {"type": ["null", "boolean"]},
        {"enum": ["a", "b c", 3, None]},
        {"const": {"x": [1.5]}},
        {"type": "string", "maxLength": 4},
        {"type": "string", "pattern": "^[a-c]{1,3}$"},
    ]
)
schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        inner.map(lambda items: {"type": "array", "items": items, "minItems": 1, "maxItems": 2}),
        st.lists(inner, min_size=1, max_size=2).map(lambda options: {"anyOf": options}),
        st.dictionaries(st.sampled_from('aé"'), inner, min_size=1, max_size=2).map(
            lambda properties: {
                "type": "object",
                "properties": properties,
                "required": list(properties)[:1],
                "additionalProperties": False,
            }
        ),
    ),
    max_leaves=3,
)
sampling = st.sampled_from(
    [{}, {"do_sample": True}, {"do_sample": True, "top_k": 5}, {"repetition_penalty": 1.3}]
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.lists(st.tuples(schemas, sampling, st.integers(0, 9)), min_size=1, max_size=4),
    others=st.integers(1, 3),
)
def test_whatever_is_finished_is_valid(
    writer: Writer, rows: list[tuple[Any, dict[str, Any], int]], others: int
) -> None:
    requests = [
        GenerationRequest(
            str(n),
            (50 + n, 60 + seed),
            SamplingParams(NEW, seed=seed, **params),
            grammar=writer.compiled(Grammar("json_schema", json.dumps(schema))),
        )
        for n, (schema, params, seed) in enumerate(rows)
    ]
    plain = [GenerationRequest(f"p{n}", (70 + n, 80), SamplingParams(12)) for n in range(others)]
    events = writer.run([*plain, *requests])
    for request, (schema, _, _) in zip(requests, rows, strict=True):
        own = events[request.request_id]
        if own[-1].finish_reason is FinishReason.EOS_TOKEN:
            jsonschema.validate(json.loads(writer.text(own)), schema)
        else:
            assert len(own) == NEW
    for request in plain:
        check_plain(writer, request, events[request.request_id])


def test_a_row_that_loses_its_slot_goes_on_where_it_was(writer: Writer) -> None:
    core = writer.core()
    grammar = writer.compiled(GRAMMARS[0])
    request = GenerationRequest("low", (9, 10), SamplingParams(NEW), grammar=grammar, priority=-1)
    low = Sequence(request, None)
    core.add(low)
    found = []
    while core.has_work:
        found += [event for name, event in core.step().events if name == "low"]
        if len(found) == 5 and not low.was_preempted:
            for n in range(SLOTS):
                core.add(Sequence(GenerationRequest(str(n), (11, n), SamplingParams(3)), None))
    assert low.was_preempted
    assert ids_of(found) == guided(writer.loaded, (9, 10), GRAMMARS[0], NEW)


@pytest.mark.parametrize("seed", range(4))
def test_sampled_texts_match_too(writer: Writer, seed: int) -> None:
    params = SamplingParams(NEW, do_sample=True, temperature=1.5, seed=seed)
    requests = [
        GenerationRequest(str(n), (9, 10), params, grammar=writer.compiled(grammar))
        for n, grammar in enumerate(GRAMMARS[:3])
    ]
    events = writer.run(requests)
    pattern, choices = GRAMMARS[1].text, json.loads(GRAMMARS[2].text)
    assert re.fullmatch(pattern, writer.text(events["1"]))
    assert writer.text(events["2"]) in choices
    alone = writer.run([requests[0]])
    assert ids_of(alone["0"]) == ids_of(events["0"])
    assert {own[-1].finish_reason for own in events.values()} <= {*FinishReason}


def test_the_end_of_the_text_comes_where_the_grammar_allows_it_alone(writer: Writer) -> None:
    [letter] = writer.loaded.tokenizer("a")["input_ids"]
    ends = (0, 2)
    compiler = GrammarCompiler(writer.loaded, frozenset(ends))
    for eos in ends:
        matcher = asyncio.run(compiler.compile(Grammar("regex", "a{3,}"))).matcher()
        allowed = []
        for _ in range(5):
            matcher.wait_for([matcher], 60)
            allowed.append([matcher.allows(token_id) for token_id in (*ends, letter)])
            matcher.advance(letter)
            assert not matcher.is_complete
        assert allowed == [[False, False, True]] * 3 + [[True, True, True]] * 2
        matcher.wait_for([matcher], 60)
        matcher.advance(eos)
        assert matcher.is_complete


def test_log_probabilities_are_the_models_own(writer: Writer) -> None:
    params = SamplingParams(4, top_logprobs=3)
    request = GenerationRequest("r", (9, 10), params, grammar=writer.compiled(GRAMMARS[1]))
    [first, *_] = writer.run([request])["r"]
    with torch.inference_mode():
        expected = writer.loaded.model(torch.tensor([[9, 10]])).logits[0, -1].log_softmax(-1)
    assert first.chosen.logprob == pytest.approx(float(expected[first.chosen.token_id]), abs=1e-4)
    assert [t.token_id for t in first.top] == expected.topk(3).indices.tolist()


def test_a_row_whose_next_tokens_are_not_known_yet_holds_up_no_other(writer: Writer) -> None:
    may_go_on = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(may_go_on.wait)  # whoever looks ahead waits behind it
        compiled = writer.compiled(GRAMMARS[0])
        slow = TokenGrammar(compiled.grammar, compiled._start, pool)
        held = GenerationRequest("held", (9, 10), SamplingParams(NEW), grammar=slow)
        plain = GenerationRequest("plain", (11, 12), SamplingParams(12))
        core = writer.core()
        sequences = [Sequence(held, None), Sequence(plain, None)]
        for sequence in sequences:
            core.add(sequence)
        events: dict[str, list[Any]] = {"held": [], "plain": []}
        while core.has_work:
            for request_id, event in core.step().events:
                events[request_id].append(event)
            if sequences[1].slot < 0:
                may_go_on.set()
            else:
                assert not events["held"]
    check_plain(writer, plain, events["plain"])
    assert ids_of(events["held"]) == guided(writer.loaded, (9, 10), GRAMMARS[0], NEW)


def test_a_grammar_that_becomes_too_complex_ends_its_own_request_only(writer: Writer) -> None:
    grammar = writer.compiled(Grammar("regex", r"(\w+\s?){50,1000}"))
    bad = GenerationRequest("bad", (9, 10), SamplingParams(NEW), grammar=grammar)
    plain = GenerationRequest("plain", (11, 12), SamplingParams(12))
    events = writer.run([bad, plain])
    assert isinstance(events["bad"][-1], GrammarFailedError)
    assert "too many" in str(events["bad"][-1])
    check_plain(writer, plain, events["plain"])


SELF = {"$ref": "#"}


@pytest.mark.parametrize(
    ("grammar", "says"),
    [
        (Grammar("regex", "("), "unclosed group"),
        (Grammar("regex", r"(a)\1"), "backreferences are not supported"),
        (Grammar("regex", "(?=a)b"), "look-around"),
        (Grammar("regex", r"a[^\s\S]"), "no text that it allows"),
        (Grammar("choice", "[]"), "the choice is empty"),
        (Grammar("regex", "(" * 5000), "regular expression"),
        (Grammar("regex", "\ud800"), "surrogates"),
        (Grammar("regex", "a" * 70_000), "70000 characters; expected at most 65536"),
        (Grammar("json_schema", "{"), "not JSON"),
        (Grammar("json_schema", "[" * 60_000), "not JSON"),
        (Grammar("json_schema", '{"minimum": NaN}'), "NaN is no JSON"),
        (Grammar("json_schema", "[" * 66 + "]" * 66), "nested so deep: 65"),
        (Grammar("json_schema", "3"), "schema"),
        (Grammar("json_schema", json.dumps(SELF)), "no text that ends"),
        (
            Grammar(
                "json_schema",
                json.dumps({"type": "object", "properties": {"n": SELF}, "required": ["n"]}),
            ),
            "no text that ends",
        ),
        (Grammar("json_schema", '{"type": "array", "minItems": 1000000000}'), "add up to so much"),
        (Grammar("json_schema", '{"type": "integer", "multipleOf": 1000003}'), "multipleOf"),
        (Grammar("json_schema", '{"type": "strin"}'), "Invalid type: strin"),
        (Grammar("json_schema", '{"not": {}}'), "Unimplemented keys"),
        (Grammar("json_schema", '{"properties": 3}'), "properties must be an object"),
        (Grammar("json_schema", '{"minimum": 5, "maximum": 3, "type": "number"}'), "greater"),
        (Grammar("json_schema", '{"$ref": "http://127.0.0.1/x"}'), "does not fetch"),
        (
            Grammar(
                "json_schema",
                json.dumps(
                    {"type": "object", "properties": {"n": {"allOf": [SELF, {"type": "object"}]}}}
                ),
            ),
            "circular",
        ),
    ],
    ids=lambda value: value.text[:40] if isinstance(value, Grammar) else "",
)
def test_a_wrong_grammar_is_refused_with_the_reason(
    writer: Writer, grammar: Grammar, says: str
) -> None:
    with pytest.raises(InvalidGrammarError, match=re.escape(says)) as refusal:
        writer.compiled(grammar)
    assert len(str(refusal.value)) < 500


def test_a_model_whose_tokens_the_library_cannot_read_has_no_grammars(writer: Writer) -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))  # noqa: S106
    for tokenizer in (None, PreTrainedTokenizerFast(tokenizer_object=words)):
        loaded = LoadedModel(writer.loaded.model, tokenizer, writer.loaded.spec)
        with pytest.raises(InvalidGrammarError, match="cannot follow a grammar"):
            asyncio.run(GrammarCompiler(loaded, frozenset({1})).compile(GRAMMARS[1]))


def test_a_compiled_grammar_is_kept(writer: Writer) -> None:
    first = writer.compiled(GRAMMARS[0])
    assert writer.compiled(Grammar("json_schema", json.dumps(RESTAURANT))) is first


def test_the_real_model_writes_a_restaurant(smollm2: LoadedModel) -> None:
    runner = choose_runner(smollm2, 2, 128)
    special = SpecialTokens.of(smollm2)
    real = Writer(smollm2, runner, GrammarCompiler(smollm2, special.eos))
    source = "name : The Eagle | area : riverside | customer rating : 5 out of 5\nAs JSON: "
    prompt = tuple(smollm2.tokenizer(source)["input_ids"])
    grammar = real.compiled(GRAMMARS[0])
    guided_request = GenerationRequest("json", prompt, SamplingParams(40), grammar=grammar)
    plain = GenerationRequest("plain", prompt, SamplingParams(8))
    events = real.run([guided_request, plain])
    assert ids_of(events["json"]) == guided(smollm2, prompt, GRAMMARS[0], 40)
    assert events["json"][-1].finish_reason is FinishReason.EOS_TOKEN
    written = json.loads(real.text(events["json"]))
    jsonschema.validate(written, RESTAURANT)
    assert written["area"] == "riverside"
    check_plain(real, plain, events["plain"])
