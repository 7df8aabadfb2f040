"""A request's id, its line in the log and, if asked for, its trace; around everything else."""

from __future__ import annotations

import logging
import re
import time
import uuid
from contextlib import AbstractContextManager, ExitStack
from typing import Protocol
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import CLIENT_GONE
from server.logs import REQUESTS
from server.request_context import RequestContext, answering

logger = logging.getLogger(REQUESTS)

HEADER = "x-request-id"
_SANE = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_QUIET = ("/health/", "/metrics")


class Tracing(Protocol):
    """What traces requests."""

    def request(
        self, request: RequestContext, scope: Scope, headers: Headers, answer: Answer
    ) -> AbstractContextManager[None]:
        """A block that answers a request."""


class RequestLog:
    """ASGI middleware, the outermost."""

    def __init__(self, app: ASGIApp, tracing: Tracing | None) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; its answer tells its id."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})  # so that what is put there inside is seen here
        headers = Headers(scope=scope)
        request = RequestContext(request_id_of(headers))
        answer = Answer(request, send)
        started = time.perf_counter()
        with ExitStack() as stack:
            stack.enter_context(answering(request))
            stack.callback(_write, request, scope, answer, started)
            if self._tracing is not None:
                stack.enter_context(self._tracing.request(request, scope, headers, answer))
            try:
                await self._app(scope, receive, answer.send)
            except Exception:
                # The framework has answered 500, and raises it for whoever writes the log: us.
                logger.exception("answering failed")
                if not answer.is_whole:
                    raise


class Answer:
    """What of an answer has been sent."""

    def __init__(self, request: RequestContext, send: Send) -> None:
        self._request = request
        self._send = send
        self.status = CLIENT_GONE
        self.is_whole = False

    async def send(self, message: Message) -> None:
        """Send a message, the first one with the request's headers."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers[HEADER] = self._request.request_id
            headers.update(self._request.headers)
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.is_whole = True


def request_id_of(headers: Headers) -> str:
    """The id that a client or proxy gave, or a new one where that is nothing to have in a log."""
    given = headers.getlist(HEADER)
    if len(given) == 1 and _SANE.fullmatch(given[0]):
        return given[0]
    return uuid.uuid4().hex


def _write(request: RequestContext, scope: Scope, answer: Answer, started: float) -> None:
    path = quote(scope["path"])  # a path may hold anything, line ends too; a query may hold keys
    level = logging.DEBUG if path.startswith(_QUIET) else logging.INFO
    if not logger.isEnabledFor(level):
        return
    caller = scope["state"].get("caller")
    facts: dict[str, object] = {
        "method": scope["method"],
        "path": path,
        "status": answer.status,
        "seconds": round(time.perf_counter() - started, 4),
    }
    if caller is not None:
        facts |= {"tenant": caller.tenant, "key_id": caller.key_id}
    if not answer.is_whole:
        facts["cut"] = True
    logger.log(
        level,
        "answered",
        extra={"facts": facts | request.facts, "request_id": request.request_id},
    )
