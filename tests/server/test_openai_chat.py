"""`POST /v1/chat/completions` and `GET /v1/models`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from httpx_sse import connect_sse

from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix
from tests.conftest import tiny_encoder_decoder
from tests.engine.reference import as_cache
from tests.server.live import LiveServer, live_server, near

MESSAGES = [
    {"role": "system", "content": "You answer in one word."},
    {"role": "user", "content": "What is the capital of France?"},
]


def chat(server: LiveServer, **body: Any) -> dict[str, Any]:
    answer = server.client.post("/v1/chat/completions", json={"messages": MESSAGES} | body)
    assert answer.status_code == httpx.codes.OK, answer.text
    found: dict[str, Any] = answer.json()
    return found


def stream(server: LiveServer, **body: Any) -> list[dict[str, Any]]:
    """The chunks of a stream that ends as it should."""
    body = {"messages": MESSAGES, "stream": True} | body
    with connect_sse(server.client, "POST", "/v1/chat/completions", json=body) as source:
        *events, done = [event.data for event in source.iter_sse()]
    assert done == "[DONE]"
    return [json.loads(event) for event in events]


def templated(endless: LoadedModel, messages: list[dict[str, str]]) -> list[int]:
    text = endless.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    ids: list[int] = endless.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@torch.inference_mode()
def continued(endless: LoadedModel, prefix: Prefix | None, ids: list[int], count: int) -> list[int]:
    """Greedy decoding by transformers, a token at a time."""
    ids = list(ids)
    start = len(ids)
    for _ in range(count):
        cache = None if prefix is None else as_cache(prefix)
        logits = endless.model(torch.tensor([ids]), past_key_values=cache).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids[start:]


@pytest.mark.parametrize("task", [None, "middle"])
def test_the_models_own_template_is_what_it_reads(
    server: LiveServer, endless: LoadedModel, prefixes: dict[str, Prefix], task: str | None
) -> None:
    ids = templated(endless, MESSAGES)
    expected = continued(endless, prefixes[task] if task else None, ids, 6)
    found = chat(
        server,
        model=task or endless.spec.name,
        max_completion_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    [choice] = found["choices"]
    assert found["object"] == "chat.completion"
    assert found["usage"]["prompt_tokens"] == len(ids)
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "length"
    tokens = choice["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens) == choice["message"]["content"]
    text = endless.tokenizer.decode(expected, skip_special_tokens=True)
    assert choice["message"]["content"] == text
    for token in tokens:
        likeliest, other = token["top_logprobs"]
        assert likeliest["logprob"] == token["logprob"] >= other["logprob"]
    shown = b"".join(bytes(token["bytes"] or []) for token in tokens)
    assert shown.decode() == choice["message"]["content"]


def test_parts_and_developers_are_texts_and_systems(
    server: LiveServer, endless: LoadedModel
) -> None:
    messages = [
        {"role": "developer", "content": MESSAGES[0]["content"]},
        {
            "role": "user",
            "name": "x",
            "content": [
                {"type": "text", "text": "What is the capital "},
                {"type": "text", "text": "of France?"},
            ],
        },
    ]
    same = {"model": "middle", "max_tokens": 5, "temperature": 0}
    found, expected = chat(server, messages=messages, **same), chat(server, **same)
    assert found["choices"] == expected["choices"]
    assert found["usage"] == expected["usage"]


def test_a_message_is_data_and_no_template(server: LiveServer, endless: LoadedModel) -> None:
    messages = [{"role": "user", "content": "{{ 7 * 7 }}{% for x in y %}" * 200}]
    found = chat(server, messages=messages, model="middle", max_tokens=1)
    assert found["usage"]["prompt_tokens"] == len(templated(endless, messages))


def test_a_stream_tells_what_a_whole_answer_tells(server: LiveServer) -> None:
    body = {"model": "middle", "max_tokens": 9, "n": 2, "seed": 5, "logprobs": True}
    whole = chat(server, **body)
    *chunks, last = stream(server, stream_options={"include_usage": True}, **body)
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    for index, choice in enumerate(whole["choices"]):
        own = [one for chunk in chunks for one in chunk["choices"] if one["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in one["delta"] for one in own[1:])
        content = "".join(one["delta"].get("content", "") for one in own)
        assert content == choice["message"]["content"]
        logged = [token for one in own for token in (one["logprobs"] or {"content": []})["content"]]
        assert logged == near(choice["logprobs"]["content"])
        assert [one["finish_reason"] for one in own][-1] == choice["finish_reason"]
    seeds = [chat(server, **body | {"n": 1, "seed": seed})["choices"][0] for seed in (5, 6)]
    assert [s["message"] for s in seeds] == [c["message"] for c in whole["choices"]]


def test_as_many_tokens_as_fit_are_the_default(
    endless: LoadedModel, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("short")
    with live_server(endless, folder, "--max-length", "64", "--max-slots", "2") as server:
        found = chat(server, model=endless.spec.name)
        assert found["usage"]["total_tokens"] == 64
        assert found["choices"][0]["finish_reason"] == "length"
        longer = [{"role": "user", "content": "again and " * 40}]
        body = {"model": endless.spec.name, "messages": longer}
        answer = server.client.post("/v1/chat/completions", json=body)
        assert answer.status_code == httpx.codes.BAD_REQUEST
        assert answer.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"model": "nobody"}, 404, "nobody"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user"}]}, 400, "content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            400,
            "messages",
        ),
        ({"tools": [{}]}, 400, "does not support"),
        ({"top_logprobs": 2}, 400, "set logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, 400, "send one of them"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"prompt": "x"}, 400, "not a field"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_refuses(server: LiveServer, change: dict[str, Any], status: int, says: str) -> None:
    body = {"model": "middle", "messages": MESSAGES} | change
    answer = server.client.post("/v1/chat/completions", json=body)
    assert answer.status_code == status, answer.text
    assert says in answer.json()["error"]["message"]


def test_models_are_the_base_model_and_the_tasks(
    server: LiveServer, endless: LoadedModel, prefixes: dict[str, Prefix]
) -> None:
    found = server.client.get("/v1/models").json()
    assert found["object"] == "list"
    first, *others = found["data"]
    assert (first["id"], first["parent"]) == (endless.spec.name, None)
    assert {one["id"] for one in others} >= set(prefixes)
    for one in found["data"]:
        assert server.client.get(f"/v1/models/{one['id']}").json() == one
    version = server.client.get("/admin/tasks/middle").json()["version"]
    assert server.client.get("/v1/models/middle").json()["root"] == version
    answer = server.client.get("/v1/models/nobody")
    assert answer.status_code == httpx.codes.NOT_FOUND
    assert answer.json()["error"]["code"] == "model_not_found"


@pytest.fixture(scope="module")
def seq2seq(endless: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server with an encoder-decoder model."""
    loaded = tiny_encoder_decoder("bart", endless.tokenizer)
    with live_server(loaded, tmp_path_factory.mktemp("seq2seq")) as server:
        yield server


def test_an_encoder_decoder_completes_and_does_not_score(seq2seq: LiveServer) -> None:
    client, body = seq2seq.client, {"model": "tiny-bart", "prompt": "a river", "temperature": 0}
    expected = seq2seq.generate("a river", max_new_tokens=16)["generated_text"]
    found = client.post("/v1/completions", json=body | {"echo": True, "logprobs": None}).json()
    assert found["choices"][0]["text"] == f"a river{expected}"
    found = client.post("/v1/completions", json=body | {"logprobs": 1}).json()
    assert found["choices"][0]["logprobs"]["token_logprobs"]
    for refused in ({"echo": True, "logprobs": 0}, {"echo": True, "max_tokens": 0}):
        answer = client.post("/v1/completions", json=body | refused)
        assert answer.status_code == httpx.codes.BAD_REQUEST
        assert "has an encoder" in answer.json()["error"]["message"]
    parameters = {"details": True, "decoder_input_details": True}
    answer = client.post("/generate", json={"inputs": "a river", "parameters": parameters})
    assert answer.status_code == httpx.codes.UNPROCESSABLE_ENTITY


def test_a_model_without_a_template_says_so(
    endless: LoadedModel, tmp_path_factory: pytest.TempPathFactory
) -> None:
    template = endless.tokenizer.chat_template
    endless.tokenizer.chat_template = None
    try:
        with live_server(endless, tmp_path_factory.mktemp("plain")) as server:
            body = {"model": endless.spec.name, "messages": MESSAGES}
            answer = server.client.post("/v1/chat/completions", json=body)
    finally:
        endless.tokenizer.chat_template = template
    assert answer.status_code == httpx.codes.BAD_REQUEST
    assert "no chat template" in answer.json()["error"]["message"]
