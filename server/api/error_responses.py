"""Answers to errors, in the words of the API that was called."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus

from fastapi import FastAPI, HTTPException, Request
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import Response
from starlette.routing import Match, Route

from server.api.errors import ErrorAnswer, answer_to, handled_kinds
from server.api.openai.errors import openai_answer_to

OPENAI_PATHS = "/v1/"
_NOT_ALLOWED = HTTPStatus.METHOD_NOT_ALLOWED

AnswerTo = Callable[[BaseException], ErrorAnswer]
"""How an API answers an error."""


def answers_of(path: str) -> AnswerTo:
    """How the API at a path answers errors."""
    return openai_answer_to if path.startswith(OPENAI_PATHS) else answer_to


def install_error_handlers(app: FastAPI) -> None:
    """Answer every error of every route, and of unknown routes."""
    for kind in handled_kinds():
        app.add_exception_handler(kind, _handle)


def response_to(error: Exception, path: str) -> Response:
    """The answer to any error."""
    answer = answers_of(path)(error)
    return Response(
        answer.body(), answer.status, dict(answer.headers), media_type="application/json"
    )


def _allowed(request: Request) -> str:
    """Every method of a path: a route knows its own, and each method has a route."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    here = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    return ", ".join(sorted({method for route in here for method in route.methods or ()}))


async def _handle(request: Request, error: Exception) -> Response:
    path = request.url.path
    if isinstance(error, StarletteHTTPException) and error.status_code == HTTPStatus.NOT_FOUND:
        error = HTTPException(404, f"no such page: {request.method} {path}; see /docs")
    if isinstance(error, StarletteHTTPException) and error.status_code == _NOT_ALLOWED:
        error = HTTPException(_NOT_ALLOWED, headers={"Allow": _allowed(request)})
    return response_to(error, path)
