"""When to ask again and how long to wait before it."""

from __future__ import annotations

import logging
from typing import Any

import httpx
import tenacity

from clients._errors import APIStatusError, QueueFullError, UnavailableError

MAX_WAIT_SECONDS = 30.0
"""A server that asks for a longer wait than this gets its error handed to the caller at once."""

_logger = logging.getLogger("prefixserve.clients")

# A request that timed out while the server worked is not among them: asking again adds to its load.
_BROKEN_CONNECTION = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ConnectTimeout)

# "Full jitter", uniform between 0 and the exponential: refused clients come back spread out.
_backoff = tenacity.wait_random_exponential(multiplier=0.5, max=8)


def retry_options(max_retries: int) -> dict[str, Any]:
    """Arguments for tenacity's `Retrying` and `AsyncRetrying`.

    They belong around the part of a call that ends when the answer's headers are there, so that
    nothing is asked twice once an answer has begun.
    """
    return {
        "retry": tenacity.retry_if_exception(_is_transient),
        "wait": _wait_seconds,
        "stop": tenacity.stop_after_attempt(max_retries + 1),
        "before_sleep": tenacity.before_sleep_log(_logger, logging.INFO),
        "reraise": True,
    }


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, QueueFullError | UnavailableError):
        return error.retry_after is None or error.retry_after <= MAX_WAIT_SECONDS
    return isinstance(error, _BROKEN_CONNECTION)


def _wait_seconds(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, APIStatusError) else None
    return (asked or 0.0) + _backoff(state)
