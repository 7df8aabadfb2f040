"""Structured output through OpenAI's own client, with OpenAI's and vLLM's names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.server.live import LiveServer
from tests.server.test_structured_output import SCHEMA, valid

CHAT: list[Any] = [{"role": "user", "content": "name : The Eagle | area : riverside"}]
NAMED = {"type": "json_schema", "json_schema": {"name": "restaurant", "schema": SCHEMA}}
CHOICES = ["positive", "negative"]


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client: openai.OpenAI, **options: Any) -> str:
    answer = client.chat.completions.create(
        model="middle", messages=CHAT, max_tokens=80, temperature=0, **options
    )
    assert answer.choices[0].finish_reason == "stop"
    return answer.choices[0].message.content or ""


def test_response_format(client: openai.OpenAI) -> None:
    text = chat(client, response_format=NAMED)
    valid(text)
    chunks = client.chat.completions.create(
        model="middle",
        messages=CHAT,
        max_tokens=80,
        temperature=0,
        stream=True,
        response_format=NAMED,  # type: ignore[call-overload]
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text


@pytest.mark.parametrize(
    "extra",
    [{"structured_outputs": {"json": SCHEMA}}, {"guided_json": SCHEMA}],
    ids=str,
)
def test_vllms_schemas(client: openai.OpenAI, extra: dict[str, Any]) -> None:
    assert chat(client, extra_body=extra) == chat(client, response_format=NAMED)


def test_vllms_expressions_and_choices(client: openai.OpenAI) -> None:
    regex = "[0-9]{3}-[A-F]{2,4}"
    for extra in ({"structured_outputs": {"regex": regex}}, {"guided_regex": regex}):
        assert re.fullmatch(regex, chat(client, extra_body=extra))
    for extra in ({"structured_outputs": {"choice": CHOICES}}, {"guided_choice": CHOICES}):
        assert chat(client, extra_body=extra) in CHOICES


def test_completions_take_it_too(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="middle",
        prompt=["One", "Two"],
        n=2,
        max_tokens=80,
        extra_body={"response_format": NAMED},
    )
    assert len(answer.choices) == 4
    for choice in answer.choices:
        valid(choice.text)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}},
            "no text that ends",
        ),
        ({"guided_regex": "("}, "unclosed group"),
        ({"guided_choice": []}, "guided_choice"),
        ({"structured_outputs": {"grammar": "x"}}, "structured_outputs.grammar"),
        ({"guided_regex": "a", "structured_outputs": {"choice": ["b"]}}, "2 forms"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
    ],
    ids=str,
)
def test_refusals_are_400(client: openai.OpenAI, options: dict[str, Any], says: str) -> None:
    with pytest.raises(openai.BadRequestError, match=re.escape(says)):
        client.chat.completions.create(model="middle", messages=CHAT, extra_body=options)
