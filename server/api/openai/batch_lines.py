"""Answers a line of a batch as the endpoint it names answers a request."""

from __future__ import annotations

import json
import logging
from typing import Any, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import Field, ValidationError
from pydantic_core import from_json

from server.api.openai import chat, completions
from server.api.openai.errors import openai_answer_to
from server.api.openai.requests import ChatRequest, CompletionRequest
from server.api.parameters import RequestModel
from server.batches.batch_run import LineAnswer
from server.callers import Caller
from server.errors import InvalidRequestError
from server.services import Services

logger = logging.getLogger(__name__)

Endpoint = Literal["/v1/completions", "/v1/chat/completions"]

PRIORITY = -1
"""Below what people wait for, which has 0."""

_MAX_ID_CHARS = 512


class BatchLine(RequestModel):
    """A request in a file."""

    custom_id: str = Field(max_length=_MAX_ID_CHARS)
    method: Literal["POST"]
    url: str
    body: dict[str, Any]


async def answer_line(services: Services, caller: Caller, endpoint: str, line: bytes) -> LineAnswer:
    """The answer to a line; what cannot be answered now says when to try again."""
    try:
        request = BatchLine.model_validate_json(line)
    except ValidationError as error:
        message = openai_answer_to(_invalid(error)).json_message
        return LineAnswer(_custom_id(line), None, {"code": "invalid_line", "message": message})
    try:
        body = await _complete(services, caller, endpoint, request)
    except Exception as error:
        answer = openai_answer_to(error)
        if answer.status == 500:
            logger.warning("a line of a batch failed", exc_info=error)
        retry_after = None
        if answer.status in (429, 503):
            retry_after = float(answer.headers.get("Retry-After", "1"))
        return LineAnswer(request.custom_id, answer.status, json.loads(answer.body()), retry_after)
    return LineAnswer(request.custom_id, 200, body)


async def _complete(
    services: Services, caller: Caller, endpoint: str, line: BatchLine
) -> dict[str, Any]:
    if line.url != endpoint:
        raise InvalidRequestError(
            f"url is {line.url[:80]!r} in a batch for {endpoint!r}; expected the batch's endpoint"
        )
    if line.body.get("stream"):
        raise InvalidRequestError("stream is true, and a batch has no streams; leave it out")
    try:
        if endpoint == "/v1/completions":
            text = CompletionRequest.model_validate(line.body)
            answer = await completions.complete(services, caller, text, priority=PRIORITY)
            return answer.model_dump(mode="json")
        messages = ChatRequest.model_validate(line.body)
        chat_answer = await chat.complete(services, caller, messages, priority=PRIORITY)
        return chat_answer.model_dump(mode="json")
    except ValidationError as error:
        raise _invalid(error) from error


def _invalid(error: ValidationError) -> RequestValidationError:
    return RequestValidationError(error.errors(include_url=False), body={})


def _custom_id(line: bytes) -> str | None:
    """The name that a line has in spite of what is wrong with it."""
    try:
        fields = from_json(line)
    except ValueError:
        return None
    name = fields.get("custom_id") if isinstance(fields, dict) else None
    return name[:_MAX_ID_CHARS] if isinstance(name, str) else None
