"""Who sends a request, found out before anything else of it is read."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from prefix_store.errors import StoreUnavailableError
from server.api.error_responses import response_to
from server.authentication import Authenticate
from server.errors import AuthenticationError
from server.metrics import Metrics

OPEN_PATHS = frozenset(
    {"/health/live", "/health/ready", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"}
)
"""What anybody may ask: how the server is, and what its requests look like."""


class Authentication:
    """ASGI middleware: puts the caller into the request's state, or refuses the request.

    It is in front of every route, so that none can be left out by mistake.
    """

    def __init__(self, app: ASGIApp, authenticate: Authenticate, metrics: Metrics) -> None:
        self._app = app
        self._authenticate = authenticate
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its caller."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        headers = [value for name, value in scope["headers"] if name == b"authorization"]
        try:
            caller = await self._authenticate(headers)
        except (AuthenticationError, StoreUnavailableError) as error:
            if isinstance(error, AuthenticationError):
                self._metrics.refused_keys.inc()
            await response_to(error, scope["path"])(scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = caller
        await self._app(scope, receive, send)
