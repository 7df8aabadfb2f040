"""`POST /v1/completions` beside `/generate` and beside transformers."""

from __future__ import annotations

import json
from typing import Any

import httpx
import hypothesis.strategies as st
import pytest
import torch
from httpx_sse import connect_sse
from hypothesis import given

from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix
from server.api.openai.texts import TextWithoutStop
from server.chunks import Chunk, Finish, Token
from server.engine.protocol import FinishReason
from tests.engine.reference import as_cache
from tests.server.live import LiveServer, near

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def base(endless: LoadedModel) -> str:
    """The base model's name."""
    return endless.spec.name


def complete(server: LiveServer, **body: Any) -> dict[str, Any]:
    answer = server.client.post("/v1/completions", json=body)
    assert answer.status_code == httpx.codes.OK, answer.text
    found: dict[str, Any] = answer.json()
    return found


def stream(server: LiveServer, **body: Any) -> list[dict[str, Any]]:
    """The chunks of a stream that ends as it should."""
    body["stream"] = True
    with connect_sse(server.client, "POST", "/v1/completions", json=body) as source:
        *events, done = [event.data for event in source.iter_sse()]
    assert done == "[DONE]"
    return [json.loads(event) for event in events]


def ids_of(endless: LoadedModel, text: str) -> list[int]:
    ids: list[int] = endless.tokenizer(text)["input_ids"]
    return ids


@torch.inference_mode()
def logprobs_of(endless: LoadedModel, prefix: Prefix | None, ids: list[int]) -> torch.Tensor:
    """float32 `[tokens - 1, vocab]`."""
    cache = None if prefix is None else as_cache(prefix)
    logits = endless.model(torch.tensor([ids]), past_key_values=cache).logits
    return logits[0, :-1].log_softmax(-1)


@pytest.mark.parametrize("task", [None, "middle"])
def test_greedy_text_is_that_of_generate(server: LiveServer, base: str, task: str | None) -> None:
    expected = server.generate(PROMPT, task, max_new_tokens=8)
    found = complete(server, model=task or base, prompt=PROMPT, max_tokens=8, temperature=0)
    assert found["object"] == "text_completion"
    assert found["model"] == (task or base)
    [choice] = found["choices"]
    assert choice["text"] == expected["generated_text"]
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    assert found["usage"] == {
        "prompt_tokens": expected["prompt_tokens"],
        "completion_tokens": 8,
        "total_tokens": expected["prompt_tokens"] + 8,
    }
    if task:
        assert found["system_fingerprint"] == expected["version"]


def test_sixteen_sampled_tokens_are_the_default(server: LiveServer) -> None:
    found = [complete(server, model="middle", prompt=PROMPT) for _ in range(2)]
    assert [one["usage"]["completion_tokens"] for one in found] == [16, 16]
    texts = [one["choices"][0]["text"] for one in found]
    assert texts[0] != texts[1]


def test_tokens_and_lists_are_prompts_too(server: LiveServer, endless: LoadedModel) -> None:
    texts = [PROMPT, "The river"]
    ids = [ids_of(endless, text) for text in texts]
    same = {"model": "middle", "max_tokens": 5, "temperature": 0}
    expected = [server.generate(text, "middle", max_new_tokens=5) for text in texts]
    for prompt in (texts, ids):
        found = complete(server, prompt=prompt, **same)
        assert [choice["index"] for choice in found["choices"]] == [0, 1]
        assert [c["text"] for c in found["choices"]] == [e["generated_text"] for e in expected]
        assert found["usage"]["prompt_tokens"] == sum(map(len, ids))
    [choice] = complete(server, prompt=ids[0], **same)["choices"]
    assert choice["text"] == expected[0]["generated_text"]


def test_texts_of_one_prompt_have_seeds_that_follow(server: LiveServer) -> None:
    same = {"model": "middle", "prompt": [PROMPT, "The river"], "max_tokens": 6}
    found = complete(server, n=3, seed=40, **same)
    assert [choice["index"] for choice in found["choices"]] == list(range(6))
    for offset in range(3):
        alone = complete(server, seed=40 + offset, **same)["choices"]
        assert [found["choices"][i]["text"] for i in (offset, 3 + offset)] == [
            choice["text"] for choice in alone
        ]
    assert found["usage"]["completion_tokens"] == 36
    assert found["usage"]["prompt_tokens"] == sum(
        server.generate(text, "middle", max_new_tokens=1)["prompt_tokens"]
        for text in same["prompt"]
    )


def test_the_best_have_the_highest_mean_logprob(server: LiveServer) -> None:
    same = {"model": "middle", "prompt": PROMPT, "max_tokens": 6, "seed": 7, "logprobs": 0}
    every = complete(server, n=5, **same)["choices"]
    every.sort(key=lambda choice: sum(choice["logprobs"]["token_logprobs"]), reverse=True)
    found = complete(server, n=2, best_of=5, **same)
    assert [choice["index"] for choice in found["choices"]] == [0, 1]
    assert [c["text"] for c in found["choices"]] == [c["text"] for c in every[:2]]
    assert found["usage"]["completion_tokens"] == 30


@pytest.mark.parametrize("task", [None, "middle", "long"])
@pytest.mark.parametrize("max_tokens", [0, 3])
@pytest.mark.parametrize("streams", [False, True])
def test_echo_scores_the_prompt_as_transformers_does(
    server: LiveServer,
    endless: LoadedModel,
    prefixes: dict[str, Prefix],
    base: str,
    *,
    task: str | None,
    max_tokens: int,
    streams: bool,
) -> None:
    text = "The Eagle is a café by the river – naïve, cheap. 日本"
    body = {"model": task or base, "max_tokens": max_tokens, "temperature": 0, "logprobs": 2}
    ids = ids_of(endless, text)
    for prompt in (text, ids):
        if streams:
            chunks = [one["choices"][0] for one in stream(server, prompt=prompt, echo=True, **body)]
            found = joined(chunks)
        else:
            [found] = complete(server, prompt=prompt, echo=True, **body)["choices"]
        logprobs, whole = found["logprobs"], found["text"]
        assert whole.startswith(text)
        assert found["finish_reason"] == "length"
        generated = server.generate(text, task, max_new_tokens=3, details=True)
        new = [token["id"] for token in generated["details"]["tokens"]] if max_tokens else []
        assert whole == text + (generated["generated_text"] if max_tokens else "")
        expected = logprobs_of(endless, prefixes[task] if task else None, ids + new)
        first, *others = logprobs["token_logprobs"]
        assert first is None
        assert logprobs["top_logprobs"][0] is None
        own = expected.gather(1, torch.tensor((ids + new)[1:])[:, None])[:, 0]
        assert others == pytest.approx(own.tolist(), abs=1e-4)
        best = expected.topk(2).values.tolist()
        for top, token, value in zip(logprobs["top_logprobs"][1:], others, best, strict=True):
            assert sorted(top.values(), reverse=True)[0] == pytest.approx(value[0], abs=1e-4)
            assert token in top.values()
        places = zip(logprobs["text_offset"], logprobs["tokens"], strict=True)
        assert all(whole[at : at + len(token)] == token for at, token in places)
        assert "".join(logprobs["tokens"]) == whole


def joined(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """One choice of the chunks of one."""
    logprobs: dict[str, list[Any]] = {}
    for chunk in chunks:
        for name, values in (chunk["logprobs"] or {}).items():
            logprobs.setdefault(name, []).extend(values)
    return {
        "text": "".join(chunk["text"] for chunk in chunks),
        "logprobs": logprobs or None,
        "finish_reason": chunks[-1]["finish_reason"],
    }


def test_a_template_is_part_of_what_is_echoed(
    server: LiveServer, endless: LoadedModel, prefixes: dict[str, Prefix]
) -> None:
    prefix = prefixes["short"]
    with_template = Prefix.of(
        prefix.keys, prefix.values, method="random", template="In: {source}\nOut:"
    )
    server.upload("templated", with_template)
    body = {"model": "templated", "echo": True, "max_tokens": 0}
    [choice] = complete(server, prompt="a river", logprobs=0, **body)["choices"]
    assert choice["text"] == "In: a river\nOut:"
    ids = ids_of(endless, choice["text"])
    own = logprobs_of(endless, prefix, ids).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(own.tolist(), abs=1e-4)
    # Tokens are taken as they are.
    [choice] = complete(server, prompt=ids_of(endless, "a river"), **body)["choices"]
    assert choice["text"] == "a river"


def test_a_stream_tells_what_a_whole_answer_tells(server: LiveServer) -> None:
    body = {
        "model": "middle",
        "prompt": [PROMPT, "The river"],
        "n": 2,
        "seed": 3,
        "max_tokens": 9,
        "logprobs": 1,
        "echo": True,
    }
    whole = complete(server, **body)
    *chunks, last = stream(server, stream_options={"include_usage": True}, **body)
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1
    for index, choice in enumerate(whole["choices"]):
        own = [one for chunk in chunks for one in chunk["choices"] if one["index"] == index]
        assert {"index": index, **joined(own)} == near(choice)
    assert "usage" not in stream(server, **body)[-1]


def test_a_stop_string_is_left_out_and_never_sent(server: LiveServer) -> None:
    body = {"model": "middle", "prompt": PROMPT, "max_tokens": 20, "temperature": 0}
    text = complete(server, **body)["choices"][0]["text"]
    stop = text[len(text) // 2 :][:7]
    at = text.index(stop)
    for stops in (stop, ["never seen", stop, stop + "!"]):
        whole = complete(server, stop=stops, **body)["choices"][0]
        assert (whole["text"], whole["finish_reason"]) == (text[:at], "stop")
        chunks = [one["choices"][0] for one in stream(server, stop=stops, **body)]
        assert "".join(chunk["text"] for chunk in chunks) == text[:at]
        assert [chunk["finish_reason"] for chunk in chunks][-1] == "stop"
    assert complete(server, stop=["never seen"], **body)["choices"][0]["text"] == text


@given(
    parts=st.lists(st.text("ab!", max_size=4), max_size=8),
    stops=st.lists(st.text("ab!", min_size=1, max_size=4), max_size=3),
)
def test_what_is_held_back_comes_if_no_stop_does(parts: list[str], stops: list[str]) -> None:
    # As `Detokenizer` cuts it: the token that completes a stop string is the last.
    pieces, text = [], ""
    while parts and not any(stop in text for stop in stops):
        pieces.append(parts.pop(0))
        text += pieces[-1]
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if ends:
        pieces[-1] = pieces[-1][: len(pieces[-1]) - (len(text) - min(ends))]
        text = text[: min(ends)]
    stop = max((one for one in stops if ends and text.endswith(one)), key=len, default="")
    expected = text.removesuffix(stop)

    trimmed, found = TextWithoutStop(stops), ""
    last = Finish(text, FinishReason.STOP_SEQUENCE if ends else FinishReason.LENGTH, 1)
    for number, piece in enumerate(pieces, start=1):
        finish = last if ends and number == len(pieces) else None
        found += trimmed.push(Chunk(number, Token(7, piece, -1.0, False), (), finish))
        assert expected.startswith(found)
    if not ends:  # a special token is no part of the text
        found += trimmed.push(Chunk(1, Token(0, "<end>", -1.0, True), (), last))
    assert found == expected


def test_a_form_and_the_prompts_scores_go_together(server: LiveServer) -> None:
    body = {"model": "middle", "prompt": PROMPT, "echo": True, "logprobs": 1, "max_tokens": 12}
    formed = {"response_format": {"type": "json_object"}, "temperature": 0, **body}
    plain = complete(server, **body, temperature=0)
    count = plain["usage"]["prompt_tokens"]
    expected = plain["choices"][0]["logprobs"]["token_logprobs"][1:count]
    for _ in range(3):  # what may come next is not always known in time
        answer = complete(server, **formed)
        [choice] = answer["choices"]
        assert choice["text"].removeprefix(PROMPT).lstrip().startswith("{")
        logprobs = choice["logprobs"]["token_logprobs"]
        assert len(logprobs) == answer["usage"]["total_tokens"]
        assert logprobs[1:count] == pytest.approx(expected, abs=1e-4)


def test_what_is_told_is_what_is_accounted(server: LiveServer) -> None:
    def counted() -> dict[str, float]:
        return {
            kind: server.metric("tenant_tokens_total", tenant="default", kind=kind)
            for kind in ("prompt", "generated", "prefix")
        } | {"task": server.metric("prompt_tokens_total", task="middle")}

    before = counted()
    body = {"model": "middle", "prompt": [PROMPT, "The river"], "max_tokens": 5}
    usage = complete(server, n=2, best_of=3, **body)["usage"]
    scored = complete(server, model="middle", prompt=PROMPT, echo=True, max_tokens=0)["usage"]
    told = stream(server, n=2, stream_options={"include_usage": True}, **body)[-1]["usage"]
    found = {kind: count - before[kind] for kind, count in counted().items()}
    totals = [usage, scored, told]
    assert found["prompt"] == found["task"] == sum(one["prompt_tokens"] for one in totals)
    assert found["generated"] == sum(one["completion_tokens"] for one in totals)
    assert found["prefix"] == 8 * 5


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty"])
def test_penalties_keep_tokens_from_coming_again(server: LiveServer, penalty: str) -> None:
    body = {"model": "middle", "prompt": PROMPT, "max_tokens": 40, "temperature": 0, "logprobs": 0}
    tokens = complete(server, **body, **{penalty: 2.0})["choices"][0]["logprobs"]["tokens"]
    plain = complete(server, **body)["choices"][0]["logprobs"]["tokens"]
    assert len(set(tokens)) > len(set(plain))


@pytest.mark.parametrize(
    ("change", "status", "param", "code", "says"),
    [
        ({"model": "nobody"}, 404, "model", "model_not_found", "no task 'nobody'"),
        ({"model": "not/a name"}, 404, "model", "model_not_found", "not/a name"),
        ({"model": None}, 400, "model", None, "model"),
        ({"prompt": ""}, 400, None, None, "no tokens"),
        ({"prompt": []}, 400, "prompt", None, "expected a text"),
        ({"prompt": [[]]}, 400, "prompt", None, "expected a text"),
        ({"prompt": [1, "a"]}, 400, "prompt", None, "expected a text"),
        ({"prompt": [-1]}, 400, None, None, "token -1 is not one of the model's"),
        ({"prompt": [[5], [10**9]]}, 400, None, None, "token 1000000000 is not"),
        ({"prompt": [5] * 9000}, 400, None, "context_length_exceeded", "limit"),
        ({"suffix": "end"}, 400, "suffix", None, "does not support"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias", None, "does not support"),
        ({"logprobs": 21}, 400, "logprobs", None, "less than or equal to 20"),
        ({"max_tokens": 0}, 400, None, None, "set echo"),
        ({"n": 3, "best_of": 2}, 400, None, None, "best_of is 2 and n is 3"),
        ({"best_of": 2, "stream": True}, 400, None, None, "best_of"),
        ({"n": 65, "prompt": ["a", "b"]}, 400, None, None, "130 texts"),
        ({"stream_options": {}}, 400, None, None, "stream_options"),
        ({"temperature": -1}, 400, "temperature", None, "temperature"),
        ({"seed": 2**63}, 400, "seed", None, "seed"),
        ({"nonsense": 1}, 400, "nonsense", None, "not a field"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_refuses_in_openai_s_shape(
    server: LiveServer,
    *,
    change: dict[str, Any],
    status: int,
    param: str | None,
    code: str | None,
    says: str,
) -> None:
    body = {"model": "middle", "prompt": PROMPT} | change
    answer = server.client.post("/v1/completions", json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == (
        "invalid_request_error",
        param,
        code,
    )
    assert says in error["message"]


def test_every_error_below_v1_has_openai_s_shape(server: LiveServer) -> None:
    client = server.client
    for answer in (
        client.get("/v1/nothing"),
        client.get("/v1/completions"),
        client.post("/v1/completions", content=b"{"),
        client.post("/v1/completions", json="x" * (3 << 20)),
        client.post("/v1/completions", content=b"\xff\xfe", headers={"Content-Type": "x/y"}),
    ):
        assert answer.is_client_error
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert set(client.get("/nothing").json()) == {"error", "error_type"}


def test_leaving_a_stream_frees_its_slots(server: LiveServer) -> None:
    body = {"model": "middle", "prompt": [PROMPT, "The river"], "n": 2, "max_tokens": 8000}
    with connect_sse(
        server.client, "POST", "/v1/completions", json=body | {"stream": True}
    ) as source:
        events = source.iter_sse()  # without a reference it would be closed
        next(events)
        server.wait_until("running_requests", 4)
    server.wait_until("running_requests", 0)


def test_requests_are_counted_by_how_they_are_answered(server: LiveServer) -> None:
    def counts() -> list[float]:
        labels = [("middle", "200"), ("other", "404"), ("middle", "400")]
        return [server.metric("requests_total", task=task, status=s) for task, s in labels]

    before = counts()
    complete(server, model="middle", prompt=PROMPT, max_tokens=1)
    stream(server, model="middle", prompt=PROMPT, max_tokens=1)
    server.client.post("/v1/completions", json={"model": "nobody", "prompt": PROMPT})
    server.client.post("/v1/completions", json={"model": "middle", "prompt": [-1]})
    assert [now - then for now, then in zip(counts(), before, strict=True)] == [2, 1, 1]
