"""Writes the audit log: around every route that changes something."""

from __future__ import annotations

from datetime import UTC, datetime

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import CLIENT_GONE, answer_to
from server.audit import AuditEntry, AuditLog
from server.request_context import current_request

_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_PATHS = ("/admin/", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")


class Auditing:
    """ASGI middleware: a change is in the audit log before its client hears of it."""

    def __init__(self, app: ASGIApp, log: AuditLog) -> None:
        self._app = app
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http" or not _is_change(scope):
            await self._app(scope, receive, send)
            return
        written = False

        async def write(status: int, headers: Headers) -> None:
            nonlocal written
            if not written:
                written = True
                await self._log.write(_entry(scope, status, headers))

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                await write(message["status"], Headers(raw=message["headers"]))
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except Exception as error:
            await write(answer_to(error).status, Headers())
            raise
        finally:
            await write(CLIENT_GONE, Headers())


def _is_change(scope: Scope) -> bool:
    return scope["method"] not in _READING and scope["path"].startswith(_PATHS)


def _entry(scope: Scope, status: int, headers: Headers) -> AuditEntry:
    caller = scope.get("state", {}).get("caller")
    path = {name: str(value) for name, value in scope.get("path_params", {}).items()}
    target = path | current_request().target
    version = headers.get("etag", "").strip('"') or target.get("version")
    return AuditEntry(
        time=datetime.now(UTC).isoformat(timespec="milliseconds"),
        request_id=current_request().request_id,
        tenant=None if caller is None else caller.tenant,
        key_id=None if caller is None else caller.key_id,
        action=f"{scope['method']} {_route(scope)}",
        task=target.pop("task_id", None),
        target=target,
        version=version,
        status=status,
        outcome="done" if status < 400 else "refused" if status < 500 else "failed",
    )


def _route(scope: Scope) -> str:
    route = getattr(scope.get("route"), "path", None)
    return str(scope["path"])[:200] if route is None else str(route)
