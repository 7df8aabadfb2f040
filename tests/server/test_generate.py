"""What `/generate`, `/generate_stream` and `/` answer."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
import torch

from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix, version_of
from server.tokenization import TextTokenizer
from tests.engine.reference import as_cache, greedy
from tests.server.live import LiveServer

STORY = "Zoë's 👩‍🚀 café — naïve 東京 ﷽ \U0001f600!"


def test_an_answer_is_that_of_transformers_with_the_prefix(
    server: LiveServer, endless: LoadedModel, prefixes: dict[str, Prefix]
) -> None:
    tokenizer = TextTokenizer(endless.tokenizer)
    prompt_ids = tuple(tokenizer.backend.encode("Once upon a time").ids)
    for task_id, prefix in [*prefixes.items(), (None, None)]:
        answer = server.generate("Once upon a time", task_id, max_new_tokens=9, details=True)
        expected, _ = greedy(endless, prefix, prompt_ids, 9)
        assert [token["id"] for token in answer["details"]["tokens"]] == expected
        assert answer["generated_text"] == tokenizer.backend.decode(expected).rstrip("\ufffd")
        assert answer["task_id"] == task_id
        assert answer["version"] == (prefix and version_of(prefix.to_bytes()))
        assert answer["prefix_tokens"] == (prefix.prefix_length if prefix else 0)
        assert answer["prompt_tokens"] == len(prompt_ids)


def test_details_only_on_request_and_as_tgi_has_them(server: LiveServer) -> None:
    assert "details" not in server.generate("Hello", max_new_tokens=2)
    details = server.generate("Hello", max_new_tokens=2, details=True)["details"]
    assert details["finish_reason"] == "length"
    assert details["generated_tokens"] == len(details["tokens"]) == 2
    assert (details["prefill"], details["seed"], "top_tokens" in details) == ([], None, False)
    assert {*details["tokens"][0]} == {"id", "text", "logprob", "special"}


def test_a_stream_adds_up_to_the_answer(server: LiveServer) -> None:
    for inputs in ("Once upon a time", STORY):
        answer = server.generate(inputs, "middle", max_new_tokens=40)
        events = server.stream(inputs, "middle", max_new_tokens=40)
        assert [event["index"] for event in events] == list(range(1, 41))
        texts = [event["token"]["text"] for event in events if not event["token"]["special"]]
        assert "".join(texts) == events[-1]["generated_text"] == answer["generated_text"]
        assert {event["generated_text"] for event in events[:-1]} == {None}
        assert {str(event["details"]) for event in events[:-1]} == {"None"}
        last = events[-1]["details"]
        assert last["version"] == answer["version"]
        assert (last["prefix_tokens"], last["prompt_tokens"]) == (8, answer["prompt_tokens"])
        assert (last["generated_tokens"], last["finish_reason"]) == (40, "length")


def test_stream_true_streams_from_generate_too(server: LiveServer) -> None:
    body = {"inputs": "Hello", "stream": True, "parameters": {"max_new_tokens": 3}}
    for path in ("/generate", "/"):
        answer = server.client.post(path, json=body)
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.text.count("data:{") == 3
        assert answer.text.endswith("}\n\n")


def test_the_root_answers_with_a_list_as_tgi_does(server: LiveServer) -> None:
    answer = server.client.post("/", json={"inputs": "Hello", "parameters": None}).json()
    assert answer == [server.generate("Hello")]


def test_a_list_of_inputs_is_answered_by_a_list(server: LiveServer) -> None:
    inputs = ["Hello", "Once upon a time", STORY]
    answers = server.generate(inputs, "short", max_new_tokens=5)
    assert answers == [server.generate(text, "short", max_new_tokens=5) for text in inputs]


@pytest.mark.parametrize("settings", [{"temperature": 0.9}, {"do_sample": True}, {"top_k": 40}])
def test_a_seed_gives_the_same_text_again(server: LiveServer, settings: dict[str, Any]) -> None:
    first = server.generate("Hello", max_new_tokens=12, details=True, **settings)
    seed = first["details"]["seed"]
    assert isinstance(seed, int)
    again = server.generate("Hello", max_new_tokens=12, details=True, seed=seed, **settings)
    assert again == first
    other = server.generate("Hello", max_new_tokens=12, seed=seed + 1, **settings)
    assert other["generated_text"] != first["generated_text"]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"temperature": 0, "do_sample": True},
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0},
        {"do_sample": False, "seed": 7},
    ],
)
def test_what_has_no_effect_is_greedy(server: LiveServer, settings: dict[str, Any]) -> None:
    plain = server.generate("Hello", max_new_tokens=8, details=True)
    assert server.generate("Hello", max_new_tokens=8, details=True, **settings) == plain


def test_every_null_is_a_default(server: LiveServer) -> None:
    parameters = server.client.get("/openapi.json").json()["components"]["schemas"]["Parameters"]
    nulls = dict.fromkeys(parameters["properties"])
    body = {"inputs": "Hello", "task_id": None, "stream": None, "parameters": nulls}
    assert server.client.post("/generate", json=body).json() == server.generate("Hello")


def test_a_stop_string_ends_the_text_and_stays_in_it(server: LiveServer) -> None:
    whole = server.generate("Hello", max_new_tokens=30)["generated_text"]
    stop = whole[len(whole) // 3 :][:3]
    expected = whole[: whole.index(stop) + len(stop)]
    answer = server.generate("Hello", max_new_tokens=30, stop=["\0never", stop], details=True)
    assert answer["generated_text"] == expected
    assert answer["details"]["finish_reason"] == "stop_sequence"
    assert answer["details"]["generated_tokens"] == len(answer["details"]["tokens"]) < 30
    events = server.stream("Hello", max_new_tokens=30, stop=[stop])
    assert "".join(event["token"]["text"] for event in events) == expected


def test_top_tokens_are_the_likeliest(server: LiveServer) -> None:
    details = server.generate("Hello", max_new_tokens=3, details=True, top_n_tokens=4)["details"]
    for token, top in zip(details["tokens"], details["top_tokens"], strict=True):
        assert top[0] == token
        assert [t["logprob"] for t in top] == sorted((t["logprob"] for t in top), reverse=True)
        assert len(top) == 4
    assert [len(event["top_tokens"]) for event in server.stream("Hello", top_n_tokens=2)][:1] == [2]


def test_truncate_keeps_the_end_of_the_prompt(server: LiveServer) -> None:
    long = server.generate("one two three four Once upon a time", truncate=4, max_new_tokens=5)
    assert long["prompt_tokens"] == 4
    assert long == server.generate(" Once upon a time", max_new_tokens=5)


def test_full_text_begins_with_the_input(server: LiveServer) -> None:
    plain = server.generate("Hello", max_new_tokens=4)["generated_text"]
    full = server.generate("Hello", max_new_tokens=4, return_full_text=True)
    assert full["generated_text"] == "Hello" + plain
    events = server.stream("Hello", max_new_tokens=4, return_full_text=True)
    assert events[-1]["generated_text"] == "Hello" + plain


def test_an_adapter_is_a_task(server: LiveServer) -> None:
    expected = server.generate("Hello", "short", max_new_tokens=4)
    assert server.generate("Hello", max_new_tokens=4, adapter_id="short") == expected
    assert server.generate("Hello", "short", max_new_tokens=4, adapter_id="short") == expected


def test_the_default_length_is_clipped_to_what_is_left(
    server: LiveServer, endless: LoadedModel
) -> None:
    limit = server.client.get("/info").json()["max_total_tokens"]
    assert len(server.stream("Hello")) == 100
    [token] = endless.tokenizer(" the", add_special_tokens=False)["input_ids"]
    prompt = endless.tokenizer.decode([token] * (limit - 8 - 6))
    answer = server.generate(prompt, "middle", details=True)
    assert answer["prompt_tokens"] + answer["prefix_tokens"] + 6 == limit
    assert answer["details"]["generated_tokens"] == 6


async def test_100_at_once_each_get_their_own_answer(server: LiveServer) -> None:
    tasks = ["short", "middle", "long", None]
    bodies = [
        {"inputs": f"Story {n}:", "task_id": tasks[n % 4], "parameters": {"max_new_tokens": 8}}
        for n in range(100)
    ]
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        answers = await asyncio.gather(*(client.post("/generate", json=body) for body in bodies))
    texts = [answer.json()["generated_text"] for answer in answers]
    for body, text in list(zip(bodies, texts, strict=True))[::9]:
        alone = server.client.post("/generate", json=body).json()
        assert alone["generated_text"] == text


def test_info_tells_what_a_prefix_must_fit(server: LiveServer, endless: LoadedModel) -> None:
    info = server.client.get("/info").json()
    spec = endless.spec
    assert (info["model_id"], info["model_sha"]) == (spec.name, spec.fingerprint)
    shape = (info["num_layers"], info["num_kv_heads"], info["head_dim"])
    assert shape == (spec.num_layers, spec.num_kv_heads, spec.head_dim)
    assert (info["model_dtype"], info["model_device_type"]) == ("float32", "cpu")


def test_the_documentation_explains_every_field_with_an_example(server: LiveServer) -> None:
    schema = server.client.get("/openapi.json").json()
    own = {name: s for name, s in schema["components"]["schemas"].items() if "properties" in s}
    assert {"GenerateRequest", "Parameters", "StreamEvent", "TaskResponse", "ErrorResponse"} <= {
        *own
    }
    for name, model in own.items():
        for field, described in model["properties"].items():
            assert described.get("description"), (name, field)
            nested = "$ref" in json.dumps(described)
            assert nested or "examples" in described, (name, field)
    upload = schema["paths"]["/admin/tasks/{task_id}"]["put"]["requestBody"]["content"]
    assert {*upload} == {"multipart/form-data", "application/json"}
    assert server.client.get("/docs").status_code == httpx.codes.OK


def test_the_prompts_tokens_are_scored_on_request(
    server: LiveServer, endless: LoadedModel, prefixes: dict[str, Prefix]
) -> None:
    ids = endless.tokenizer(STORY)["input_ids"]
    with torch.inference_mode():
        cache = as_cache(prefixes["middle"])
        logits = endless.model(torch.tensor([ids]), past_key_values=cache).logits[0, :-1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    settings = {"max_new_tokens": 2, "details": True, "decoder_input_details": True}
    prefill = server.generate(STORY, "middle", **settings)["details"]["prefill"]
    assert [token["id"] for token in prefill] == ids
    assert "".join(token["text"] for token in prefill) == STORY
    assert prefill[0]["logprob"] is None
    assert [token["logprob"] for token in prefill[1:]] == pytest.approx(expected, abs=1e-4)


def test_best_of_answers_with_the_likeliest_of_several(server: LiveServer) -> None:
    settings = {"max_new_tokens": 5, "details": True, "temperature": 1.2}
    alone = [server.generate(STORY, "middle", seed=seed, **settings) for seed in (11, 12, 13)]

    def logprob(details: dict[str, Any]) -> float:
        return sum(token["logprob"] for token in details["tokens"])

    alone.sort(key=lambda one: logprob(one["details"]), reverse=True)
    found = server.generate([STORY, STORY], "middle", seed=11, best_of=3, **settings)
    for answer in found:
        assert answer["generated_text"] == alone[0]["generated_text"]
        others = answer["details"]["best_of_sequences"]
        assert [one["generated_text"] for one in others] == [
            one["generated_text"] for one in alone[1:]
        ]
        assert [one["seed"] for one in others] == [one["details"]["seed"] for one in alone[1:]]


@pytest.mark.parametrize("parameter", [{"best_of": 2, "seed": 1}, {"decoder_input_details": True}])
def test_what_is_known_at_the_end_only_is_not_for_streams(
    server: LiveServer, parameter: dict[str, Any]
) -> None:
    body = {"inputs": STORY, "parameters": {"do_sample": True, "details": True} | parameter}
    answer = server.client.post("/generate_stream", json=body)
    assert answer.status_code == httpx.codes.UNPROCESSABLE_ENTITY
    assert "not for streams" in answer.json()["error"]


@pytest.mark.parametrize("text", [STORY, "word " * 1000])
def test_tokenize_tells_which_characters_each_token_stands_for(
    server: LiveServer, endless: LoadedModel, text: str
) -> None:
    answer = server.client.post("/tokenize", json={"inputs": text})
    assert answer.status_code == httpx.codes.OK
    tokens = answer.json()
    assert [token["id"] for token in tokens] == endless.tokenizer(text)["input_ids"]
    assert all(text[token["start"] : token["stop"]] == token["text"] for token in tokens)
    assert (tokens[0]["start"], tokens[-1]["stop"]) == (0, len(text))
    answer = server.client.post("/tokenize", json={"inputs": [text]})
    assert answer.status_code == httpx.codes.UNPROCESSABLE_ENTITY
