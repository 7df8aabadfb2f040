"""Structured output through the server, as text-generation-inference's clients ask for it."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import httpx
import jsonschema
import pytest
import text_generation
from huggingface_hub import InferenceClient
from text_generation.types import Grammar

from tests.server.live import LiveServer

# text-generation still calls pydantic's first API.
pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")

PROMPT = "name : The Eagle | area : riverside"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "area": {"enum": ["riverside", "city centre"]},
        "rating": {"type": "integer", "minimum": 1, "maximum": 5},
    },
    "required": ["name", "area", "rating"],
    "additionalProperties": False,
}
JSON = {"type": "json", "value": SCHEMA}
REGEX = {"type": "regex", "value": "[0-9]{3}-[A-F]{2,4}"}
CHOICE = {"type": "choice", "value": ["positive", "negative"]}


def valid(text: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(text)
    jsonschema.validate(value, SCHEMA)
    return value


@pytest.mark.parametrize(
    "grammar",
    [
        JSON,
        {"type": "json", "value": json.dumps(SCHEMA)},
        {"type": "json_schema", "value": {"name": "restaurant", "schema": SCHEMA}},
    ],
    ids=["schema", "text", "named"],
)
@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "seed": 3}], ids=str)
def test_a_schema_is_kept_to(
    server: LiveServer, grammar: dict[str, Any], settings: dict[str, Any]
) -> None:
    answer = server.generate(
        PROMPT, "middle", max_new_tokens=80, details=True, grammar=grammar, **settings
    )
    valid(answer["generated_text"])
    assert answer["details"]["finish_reason"] == "eos_token"
    events = server.stream(PROMPT, "middle", max_new_tokens=80, grammar=grammar, **settings)
    assert [e["token"]["id"] for e in events] == [t["id"] for t in answer["details"]["tokens"]]
    assert events[-1]["generated_text"] == answer["generated_text"]


def test_an_expression_a_choice_and_any_object(server: LiveServer) -> None:
    text = server.generate(PROMPT, max_new_tokens=20, grammar=REGEX)["generated_text"]
    assert re.fullmatch(REGEX["value"], text)
    texts = server.generate([PROMPT, "Bad."], max_new_tokens=20, grammar=CHOICE)
    assert {one["generated_text"] for one in texts} <= {*CHOICE["value"]}
    text = server.generate(PROMPT, max_new_tokens=5, grammar={"type": "json_object"})
    assert text["generated_text"].startswith("{")


def test_what_is_cut_off_says_so(server: LiveServer) -> None:
    answer = server.generate(PROMPT, max_new_tokens=3, grammar=JSON, details=True)
    assert answer["details"]["finish_reason"] == "length"
    assert answer["details"]["generated_tokens"] == 3


def test_a_stop_string_ends_it_too(server: LiveServer) -> None:
    stopped = server.generate(PROMPT, max_new_tokens=80, grammar=JSON, stop=["area"], details=True)
    assert stopped["generated_text"].endswith("area")
    assert stopped["details"]["finish_reason"] == "stop_sequence"


def test_hugging_face_clients(server: LiveServer) -> None:
    hub = InferenceClient(base_url=server.url)
    text = hub.text_generation(PROMPT, max_new_tokens=80, grammar=JSON)  # type: ignore[arg-type]
    assert valid(text) == valid(
        server.generate(PROMPT, max_new_tokens=80, grammar=JSON)["generated_text"]
    )
    tgi = text_generation.Client(server.url, timeout=60)
    regex = Grammar(**REGEX)
    found = tgi.generate(PROMPT, max_new_tokens=20, grammar=regex).generated_text
    assert re.fullmatch(REGEX["value"], found)


async def test_requests_without_one_beside_them_are_the_same_as_alone(server: LiveServer) -> None:
    grammars = [None, JSON, None, REGEX, CHOICE]
    bodies = [
        {
            "inputs": f"Story {n}:",
            "task_id": ["short", "long", None][n % 3],
            "parameters": {"max_new_tokens": 40, "grammar": grammars[n % 5]},
        }
        for n in range(30)
    ]
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        answers = await asyncio.gather(*(client.post("/generate", json=body) for body in bodies))
    texts = [answer.json()["generated_text"] for answer in answers]
    for body, text in list(zip(bodies, texts, strict=True))[::4]:
        assert server.client.post("/generate", json=body).json()["generated_text"] == text


def deep(levels: int) -> Any:
    schema: Any = {"type": "integer"}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("grammar", "says"),
    [
        ({"type": "json", "value": {"$ref": "#"}}, "no text that ends"),
        ({"type": "json", "value": "{"}, "not JSON"),
        ({"type": "json", "value": deep(70)}, "nested so deep"),
        ({"type": "json", "value": deep(900)}, "nested so deep"),
        ({"type": "json", "value": 3}, "parameters.grammar.json.value"),
        ({"type": "json", "value": {"type": "strin"}}, "Invalid type: strin"),
        ({"type": "json", "value": {"description": "\ud800"}}, "JSON schema"),
        ({"type": "json", "value": {"minimum": float("nan")}}, "JSON schema"),
        ({"type": "json", "value": {"title": "x" * 70_000}}, "characters; expected at most 65536"),
        ({"type": "json_schema", "value": {"name": "x"}}, "value.schema is missing"),
        ({"type": "regex", "value": "("}, "unclosed group"),
        ({"type": "regex", "value": r"[^\s\S]"}, "no text that it allows"),
        ({"type": "regex", "value": ""}, "parameters.grammar.regex.value"),
        ({"type": "choice", "value": []}, "parameters.grammar.choice.value"),
        ({"type": "choice", "value": ["x"] * 1001}, "parameters.grammar.choice.value"),
        ({"type": "poem", "value": "x"}, "parameters.grammar"),
        ({"value": "x"}, "parameters.grammar"),
        ("[0-9]", "parameters.grammar"),
    ],
    ids=lambda value: json.dumps(value)[:50],
)
@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_a_wrong_grammar_is_422_and_says_why(
    server: LiveServer, path: str, grammar: Any, says: str
) -> None:
    body = json.dumps({"inputs": "x", "parameters": {"grammar": grammar}})
    headers = {"Content-Type": "application/json"}
    answer = server.client.post(path, content=body, headers=headers)
    assert answer.status_code == 422, answer.text
    assert answer.json()["error_type"] == "validation"
    assert says in answer.json()["error"]
    assert len(answer.json()["error"]) < 600


@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 2}, {"ignore_eos": True}, {"min_new_tokens": 2}, {"no_repeat_ngram_size": 2}],
    ids=str,
)
def test_what_no_grammar_can_promise_is_refused(
    server: LiveServer, settings: dict[str, Any]
) -> None:
    parameters = {"grammar": REGEX, **settings}
    answer = server.client.post("/generate", json={"inputs": "x", "parameters": parameters})
    assert answer.status_code == 422, answer.text
    assert next(iter(settings)) in answer.json()["error"]
    assert "grammar" in answer.json()["error"]


def test_a_grammar_that_becomes_too_complex_is_422_or_the_streams_last_event(
    server: LiveServer,
) -> None:
    parameters = {"grammar": {"type": "regex", "value": r"(\w+\s?){50,1000}"}}
    body = {"inputs": "x", "parameters": parameters}
    answer = server.client.post("/generate", json=body)
    assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")
    assert "the grammar cannot be followed here" in answer.json()["error"]
    events = server.stream("x", **parameters)
    assert events[-1]["error"] == answer.json()["error"]
