"""From an exception to a status and a message, for every route."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect

from prefix_store.errors import (
    CacheFullError,
    CorruptArtefactError,
    InvalidPrefixError,
    InvalidSplitError,
    InvalidTaskIdError,
    InvalidTenantError,
    PinsFullError,
    PreconditionFailedError,
    PrefixTooLargeError,
    QuotaExceededError,
    StoreUnavailableError,
    UnknownKeyError,
    UnknownTaskError,
    UnknownVersionError,
    VersionConflictError,
)
from server.accounting.errors import LimitExceededError
from server.api.schemas import ErrorResponse
from server.batches.errors import TooManyBatchesError, UnknownBatchError
from server.engine.protocol import (
    EngineFailedError,
    GrammarFailedError,
    InvalidGrammarError,
    QueueFullError,
    RequestTooLongError,
    UnsupportedRequestError,
)
from server.errors import (
    AuthenticationError,
    DrainingError,
    ForbiddenError,
    InvalidRequestError,
)

_SHOWN_CHARS = 80
_MOST_FIELDS = 5
_RETRY = {"Retry-After": "1"}
CLIENT_GONE = 499  # nginx's word for it; nobody receives it, it is only counted


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """How an error is answered."""

    status: int
    error_type: str
    message: str
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def json_message(self) -> str:
        """The message without half surrogate pairs, which a client may have sent and JSON in UTF-8
        cannot hold."""
        return self.message.encode(errors="backslashreplace").decode()

    def body(self) -> str:
        """The JSON that every error has."""
        return ErrorResponse(error=self.json_message, error_type=self.error_type).model_dump_json()


# The first line that fits counts. Every text of these errors is written for the end user.
_KINDS: tuple[tuple[type[Exception], int, str, Mapping[str, str]], ...] = (
    (AuthenticationError, 401, "authentication", {"WWW-Authenticate": "Bearer"}),
    (ForbiddenError, 403, "forbidden", {}),
    (QuotaExceededError, 403, "quota_exceeded", {}),
    (LimitExceededError, 429, "rate_limited", {}),
    (UnknownKeyError, 404, "not_found", {}),
    (UnknownTaskError, 404, "not_found", {}),
    (UnknownVersionError, 404, "not_found", {}),
    (UnknownBatchError, 404, "not_found", {}),
    (TooManyBatchesError, 429, "rate_limited", {"Retry-After": "60"}),
    (PinsFullError, 409, "conflict", {}),
    (VersionConflictError, 409, "conflict", {}),
    (PreconditionFailedError, 412, "precondition_failed", {}),
    (InvalidTaskIdError, 422, "validation", {}),
    (InvalidTenantError, 422, "validation", {}),
    (InvalidRequestError, 422, "validation", {}),
    (InvalidSplitError, 422, "validation", {}),
    (RequestTooLongError, 422, "validation", {}),
    (InvalidGrammarError, 422, "validation", {}),
    (GrammarFailedError, 422, "validation", {}),
    (UnsupportedRequestError, 422, "validation", {}),
    (InvalidPrefixError, 422, "invalid_prefix", {}),
    (PrefixTooLargeError, 413, "too_large", {}),
    (CacheFullError, 503, "overloaded", _RETRY),
    (QueueFullError, 429, "overloaded", _RETRY),
    (StoreUnavailableError, 503, "unavailable", _RETRY),
    (DrainingError, 503, "draining", _RETRY),
    (EngineFailedError, 500, "generation", {}),
    (ClientDisconnect, CLIENT_GONE, "client_gone", {}),
    (CorruptArtefactError, 500, "storage", {}),
)


def handled_kinds() -> tuple[type[Exception], ...]:
    """Every kind of error that is answered as `answer_to` says, whatever else it is."""
    known = (kind for kind, *_ in _KINDS)
    return (*known, RequestValidationError, StarletteHTTPException, Exception)


def answer_to(error: BaseException) -> ErrorAnswer:
    """How to answer any error; what is not in the table tells nothing of its inside."""
    for kind, status, error_type, headers in _KINDS:
        if isinstance(error, kind):
            return ErrorAnswer(status, error_type, str(error), {**headers, **_retry(error)})
    if isinstance(error, RequestValidationError):
        return _validation_answer(error)
    if isinstance(error, StarletteHTTPException):
        return _http_answer(error)
    return ErrorAnswer(
        500, "internal", "the server failed on this request; its log says why. Try again later."
    )


def _retry(error: BaseException) -> Mapping[str, str]:
    if isinstance(error, LimitExceededError):
        return {"Retry-After": str(math.ceil(error.retry_after))}
    return {}


def _http_answer(error: StarletteHTTPException) -> ErrorAnswer:
    status = HTTPStatus(error.status_code)
    kinds = {HTTPStatus.NOT_FOUND: "not_found", HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "too_large"}
    message = str(error.detail)
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        message = f"this method is not allowed here; allowed: {(error.headers or {}).get('Allow')}"
    return ErrorAnswer(status, kinds.get(status, "validation"), message, error.headers or {})


def _validation_answer(error: RequestValidationError) -> ErrorAnswer:
    if isinstance(error.body, bytes):
        return ErrorAnswer(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "validation",
            "the body is not declared to be JSON; send the header Content-Type: application/json",
        )
    found: Sequence[Mapping[str, Any]] = error.errors()
    message = "; ".join(map(_field_message, found[:_MOST_FIELDS]))
    return ErrorAnswer(422, "validation", message)


def _field_message(error: Mapping[str, Any]) -> str:
    location = [str(part) for part in error["loc"] if part != "body"]
    if error["type"] == "json_invalid":
        at = f" at character {location[-1]}" if location else ""
        return f"the body is not JSON: {error['ctx']['error']}{at}"
    name = ".".join(location) or "the body"
    match error["type"]:
        case "missing":
            return f"{name} is missing" if location else "the body is empty; expected JSON"
        case "extra_forbidden":
            return f"{name} is not a field of this request; see /docs for those there are"
    shown = repr(error["input"])
    if len(shown) > _SHOWN_CHARS:
        shown = f"{shown[:_SHOWN_CHARS]}… ({len(shown)} characters)"
    return f"{name}: {error['msg'][0].lower()}{error['msg'][1:]}; found {shown}"
