"""/openapi.json: what FastAPI finds in the routes, and the errors that all of them share."""

from __future__ import annotations

from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from server.api.authentication import OPEN_PATHS
from server.api.error_responses import OPENAI_PATHS
from server.api.openai.errors import OpenAIErrorResponse
from server.api.schemas import ErrorResponse

_REFERENCE = "#/components/schemas/{model}"
EVENT_STREAM = "text/event-stream"
_BAD_INPUT = 422
_OPENAI_BAD_INPUT = 400


class DescribedAPI(FastAPI):
    """An application whose description tells every error of every route.

    A route names those of its own, such as `responses=errors(409)`; the others follow from
    what it takes.
    """

    def openapi(self) -> dict[str, Any]:
        """The description, made once."""
        if self.openapi_schema is None:
            _add_errors(super().openapi())
        assert self.openapi_schema is not None  # noqa: S101 - what `super` did
        return self.openapi_schema


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Errors that only some routes have, for `responses`; their body is the API's one."""
    return {status: {"description": HTTPStatus(status).phrase} for status in statuses}


def events(data: type[BaseModel] | None = None) -> dict[int | str, dict[str, Any]]:
    """A stream of server-sent events, for `responses`, each with such JSON as its data.

    https://spec.openapis.org/oas/v3.2.0#server-sent-event-streams
    """
    text: dict[str, Any] = {"type": "string"}
    if data is not None:
        text["contentMediaType"] = "application/json"
        text["contentSchema"] = {"$ref": _REFERENCE.format(model=data.__name__)}
    event = {"type": "object", "required": ["data"], "properties": {"data": text}}
    return {200: {"content": {EVENT_STREAM: {"itemSchema": event}}}}


def _add_errors(description: dict[str, Any]) -> None:
    schemas = description["components"]["schemas"]
    for model in (ErrorResponse, OpenAIErrorResponse):
        schema = model.model_json_schema(ref_template=_REFERENCE)
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's shape, which nobody is sent
        schemas.pop(name, None)
    for path, operations in description["paths"].items():
        for operation in operations.values():
            _describe(path, operation)


def _describe(path: str, operation: dict[str, Any]) -> None:
    is_openai = path.startswith(OPENAI_PATHS)
    responses = operation["responses"]
    # What FastAPI says of any answer that is not JSON; the events of a stream are told one by one.
    responses.get("200", {}).get("content", {}).get(EVENT_STREAM, {}).pop("schema", None)
    if is_openai:  # FastAPI's own
        responses.pop(str(_BAD_INPUT), None)
    own = [int(status) for status in responses if int(status) >= 400 and status != "416"]
    model = OpenAIErrorResponse if is_openai else ErrorResponse
    reference = {"$ref": _REFERENCE.format(model=model.__name__)}
    for status in sorted({*own, *_common(path, operation)}):
        responses[str(status)] = {
            "description": HTTPStatus(status).phrase,
            "content": {"application/json": {"schema": reference}},
        }


def _common(path: str, operation: dict[str, Any]) -> Iterator[int]:
    """The errors of whatever takes what this takes."""
    if path not in OPEN_PATHS:
        yield from (401, 403, 429, 500, 503)
    body = "requestBody" in operation
    if body:
        yield from (400, 413, 415)
    if body or operation.get("parameters"):
        yield from (404, _OPENAI_BAD_INPUT if path.startswith(OPENAI_PATHS) else _BAD_INPUT)
