"""Reading what the server answers: typed answers, typed errors."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import TypeVar

import httpx
from httpx_sse import ServerSentEvent, SSEError
from pydantic import TypeAdapter, ValidationError

from clients._answers import Health, StreamToken
from clients._errors import (
    APIConnectionError,
    APIResponseError,
    APITimeoutError,
    GenerationError,
    PrefixServeError,
    UnavailableError,
    status_error_class,
)

T = TypeVar("T")


def reader(answer: type[T]) -> Callable[[bytes | str], T]:
    """A function that reads a JSON answer of a type.

    It raises:
        APIResponseError: not JSON, or a field is missing or of the wrong type.
    """
    adapter = TypeAdapter(answer)

    def read(body: bytes | str) -> T:
        try:
            return adapter.validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "the body"
            raise APIResponseError(
                f"the answer is not one of prefixserve's ({where}: {first['msg']})"
            ) from error

    return read


_read_stream_token = reader(StreamToken)


def parse_event(event: ServerSentEvent) -> StreamToken:
    """Read one event of a stream.

    Raises:
        GenerationError: the event says that the server gave up.
        APIResponseError: it is not one of prefixserve's.
    """
    message, _ = _server_error(event.data)
    if message:
        raise GenerationError(message)
    return _read_stream_token(event.data)


def check_finished(last: StreamToken | None) -> None:
    """Refuse a stream that stopped before its last token.

    Raises:
        APIConnectionError: it did.
    """
    if last is None or last.generated_text is None:
        raise APIConnectionError("the server closed the stream before the last token")


def status_error(response: httpx.Response) -> PrefixServeError:
    """The error that a refused request raises; the body must have been read."""
    message, error_type = _server_error(response.content)
    if not message:
        return APIResponseError(
            f"{response.request.method} {response.url} was answered with status "
            f"{response.status_code} and not by prefixserve: is the address right?"
        )
    error_class = status_error_class(response.status_code)
    return error_class(message, response.status_code, error_type, _retry_after(response))


def read_health(response: httpx.Response) -> Health:
    """What the readiness probe says; "not ready" is an answer and not an error."""
    if response.is_success:
        return Health(ready=True)
    error = status_error(response)
    if isinstance(error, UnavailableError):
        return Health(ready=False, reason=str(error))
    raise error


@contextmanager
def translated_errors(base_url: httpx.URL) -> Iterator[None]:
    """Turn httpx's errors into this package's."""
    try:
        yield
    except SSEError as error:
        raise APIResponseError(f"{base_url} did not answer with a stream: {error}") from error
    except httpx.ConnectTimeout as error:
        raise APITimeoutError(f"no connection to {base_url} in time") from error
    except httpx.TimeoutException as error:
        raise APITimeoutError(f"no answer from {base_url} in time") from error
    except httpx.ConnectError as error:
        raise APIConnectionError(
            f"cannot connect to {base_url} ({error}): is the server running there?"
        ) from error
    except httpx.RequestError as error:
        raise APIConnectionError(f"the connection to {base_url} broke off: {error}") from error


def _server_error(body: bytes | str) -> tuple[str, str]:
    """Message and kind of an error, in the server's shape or OpenAI's; empty when it is neither."""
    try:
        fields = json.loads(body)
    except ValueError:
        return "", ""
    error = fields.get("error") if isinstance(fields, dict) else None
    if isinstance(error, str):
        return error, str(fields.get("error_type", ""))
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        return error["message"], str(error.get("code") or "")
    return "", ""


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds to wait; the header holds either seconds or a date (RFC 9110, 10.2.3)."""
    value = response.headers.get("retry-after", "")
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
