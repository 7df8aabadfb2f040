"""How a request says what form its text must have: as TGI does."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.engine.protocol import Grammar
from server.errors import InvalidRequestError

MAX_CHOICES = 1_000
EXAMPLE_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "area": {"enum": ["riverside", "city centre"]}},
    "required": ["name", "area"],
    "additionalProperties": False,
}


class _GrammarModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class JsonGrammar(_GrammarModel):
    """A JSON text that a schema allows."""

    type: Literal["json"] = Field(description="A JSON schema.", examples=["json"])
    value: dict[str, Any] | str = Field(
        description="The schema, or its text.", examples=[EXAMPLE_SCHEMA]
    )


class NamedSchema(_GrammarModel):
    """A schema with a name."""

    name: str | None = Field(default=None, description="Any name.", examples=["restaurant"])
    schema_: dict[str, Any] = Field(
        alias="schema", description="The schema.", examples=[EXAMPLE_SCHEMA]
    )


class JsonSchemaGrammar(_GrammarModel):
    """A JSON text that a schema with a name allows."""

    type: Literal["json_schema"] = Field(
        description="A JSON schema with a name.", examples=["json_schema"]
    )
    value: NamedSchema = Field(description="The schema and its name.")


class JsonObjectGrammar(_GrammarModel):
    """Any JSON object."""

    type: Literal["json_object"] = Field(description="Any JSON object.", examples=["json_object"])
    value: None = Field(default=None, description="Nothing.", examples=[None])


class RegexGrammar(_GrammarModel):
    """A text that a regular expression matches as a whole."""

    type: Literal["regex"] = Field(description="A regular expression.", examples=["regex"])
    value: str = Field(
        min_length=1,
        description="The expression, without look-around and back references.",
        examples=["[0-9]{3}-[0-9]{4}"],
    )


class ChoiceGrammar(_GrammarModel):
    """One of some texts."""

    type: Literal["choice"] = Field(description="One of some texts.", examples=["choice"])
    value: list[Annotated[str, Field(min_length=1)]] = Field(
        min_length=1,
        max_length=MAX_CHOICES,
        description="The texts.",
        examples=[["positive", "negative"]],
    )


GrammarParameter = Annotated[
    JsonGrammar | JsonSchemaGrammar | JsonObjectGrammar | RegexGrammar | ChoiceGrammar,
    Field(discriminator="type"),
]


def grammar_of(parameter: GrammarParameter | None) -> Grammar | None:
    """The grammar that a parameter asks for.

    Raises:
        InvalidRequestError: see `schema_grammar`.
    """
    match parameter:
        case JsonGrammar(value=schema):
            return schema_grammar(schema)
        case JsonSchemaGrammar(value=named):
            return schema_grammar(named.schema_)
        case RegexGrammar(value=text):
            return Grammar("regex", text)
        case ChoiceGrammar(value=texts):
            return choice_grammar(texts)
    return None if parameter is None else Grammar("json_object")


def schema_grammar(schema: dict[str, Any] | str) -> Grammar:
    """The grammar of a JSON schema, or of its text.

    Raises:
        InvalidRequestError: it is nested too deeply, or holds a number that JSON does not have.
    """
    if isinstance(schema, str):
        return Grammar("json_schema", schema)
    try:
        return Grammar("json_schema", json.dumps(schema, allow_nan=False))
    except (RecursionError, ValueError) as error:
        raise InvalidRequestError(f"the JSON schema cannot be read: {error}") from None


def choice_grammar(texts: list[str]) -> Grammar:
    """The grammar of a choice among texts."""
    return Grammar("choice", json.dumps(texts))
