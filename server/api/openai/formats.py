"""The form that a text must have, as OpenAI's clients and those of vLLM ask for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from server.api.grammars import EXAMPLE_SCHEMA, MAX_CHOICES, choice_grammar, schema_grammar
from server.api.parameters import RequestModel
from server.engine.protocol import Grammar
from server.errors import InvalidRequestError

T = TypeVar("T")

Choices = Annotated[
    list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_CHOICES)
]
Expression = Annotated[str, Field(min_length=1)]


class AnyText(RequestModel):
    """Any text."""

    type: Literal["text"] = Field(description="Any text.", examples=["text"])


class AnyObject(RequestModel):
    """Any JSON object."""

    type: Literal["json_object"] = Field(description="Any JSON object.", examples=["json_object"])


class NamedFormat(BaseModel):
    """A JSON schema with a name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str | None = Field(default=None, description="Any name.", examples=["restaurant"])
    description: str | None = Field(
        default=None, description="Not shown to the model.", examples=[None]
    )
    schema_: dict[str, Any] = Field(
        alias="schema", description="The schema.", examples=[EXAMPLE_SCHEMA]
    )
    strict: bool | None = Field(
        default=None, description="It is always kept to, whatever this says.", examples=[True]
    )


class JsonSchemaFormat(RequestModel):
    """JSON that a schema allows."""

    type: Literal["json_schema"] = Field(
        description="JSON that a schema allows.", examples=["json_schema"]
    )
    json_schema: NamedFormat = Field(description="The schema and its name.")


ResponseFormat = Annotated[AnyText | AnyObject | JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(RequestModel):
    """vLLM's word for it; one of these."""

    json_: dict[str, Any] | str | None = Field(
        default=None, alias="json", description="A JSON schema.", examples=[EXAMPLE_SCHEMA]
    )
    json_object: bool | None = Field(default=None, description="Any JSON object.", examples=[True])
    regex: Expression | None = Field(
        default=None, description="A regular expression.", examples=["[0-9]{3}"]
    )
    choice: Choices | None = Field(
        default=None, description="One of these texts.", examples=[["positive", "negative"]]
    )


class FormatOptions(RequestModel):
    """The form of the text; at most one."""

    response_format: ResponseFormat | None = Field(
        default=None, description="OpenAI's: any text, any JSON object, or JSON by a schema."
    )
    structured_outputs: StructuredOutputs | None = Field(
        default=None, description="vLLM's: JSON by a schema, a regular expression, or a choice."
    )
    guided_json: dict[str, Any] | str | None = Field(
        default=None, description="Old name of `structured_outputs.json`.", examples=[None]
    )
    guided_regex: Expression | None = Field(
        default=None, description="Old name of `structured_outputs.regex`.", examples=[None]
    )
    guided_choice: Choices | None = Field(
        default=None, description="Old name of `structured_outputs.choice`.", examples=[None]
    )


def grammar_of(options: FormatOptions) -> Grammar | None:
    """The grammar that a request asks for; None for any text.

    Raises:
        InvalidRequestError: it asks for several, or for a schema that cannot be read.
    """
    outputs = options.structured_outputs or StructuredOutputs()
    found = {
        "response_format": _response_grammar(options.response_format),
        "structured_outputs.json": None if outputs.json_ is None else schema_grammar(outputs.json_),
        "structured_outputs.json_object": Grammar("json_object") if outputs.json_object else None,
        "structured_outputs.regex": _if_given(_regex_grammar, outputs.regex),
        "structured_outputs.choice": _if_given(choice_grammar, outputs.choice),
        "guided_json": None if options.guided_json is None else schema_grammar(options.guided_json),
        "guided_regex": _if_given(_regex_grammar, options.guided_regex),
        "guided_choice": _if_given(choice_grammar, options.guided_choice),
    }
    asked = {name: grammar for name, grammar in found.items() if grammar is not None}
    if len(asked) > 1:
        raise InvalidRequestError(
            f"the text must have {len(asked)} forms, by {' and '.join(asked)}; send one of them"
        )
    return next(iter(asked.values()), None)


def _response_grammar(response_format: ResponseFormat | None) -> Grammar | None:
    match response_format:
        case JsonSchemaFormat(json_schema=named):
            return schema_grammar(named.schema_)
        case AnyObject():
            return Grammar("json_object")
    return None


def _regex_grammar(expression: str) -> Grammar:
    return Grammar("regex", expression)


def _if_given(make: Callable[[T], Grammar], value: T | None) -> Grammar | None:
    return None if value is None else make(value)
