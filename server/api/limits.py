"""A bound on request bodies, kept while they arrive."""

from __future__ import annotations

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.error_responses import response_to

# Boundaries and headers of the parts of a multipart upload, and a PEFT adapter's configuration.
_MULTIPART_OVERHEAD = 64 * 1024
UPLOAD_PATH = "/admin/tasks/"
FILES_PATH = "/v1/files"


class BodyTooLargeError(HTTPException):
    """The body is over the limit."""

    def __init__(self, limit: int, kind: str, overhead: int = 0) -> None:
        super().__init__(
            413,
            f"the {kind} is over this server's limit of {limit} bytes; its operator can raise "
            f"--max-{kind}-bytes",
        )
        self.limit = limit + overhead


class BodyLimit:
    """ASGI middleware: refuses a body over the limit, by its declared length or as it arrives."""

    def __init__(
        self, app: ASGIApp, max_body_bytes: int, max_upload_bytes: int, max_batch_file_bytes: int
    ) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._max_upload_bytes = max_upload_bytes
        self._max_batch_file_bytes = max_batch_file_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, counting what it receives."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(scope["path"], headers)
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > refusal.limit:
            await response_to(refusal, scope["path"])(scope, receive, send)
            return
        await self._app(scope, _counted(receive, refusal), send)

    def _refusal(self, path: str, headers: Headers) -> BodyTooLargeError:
        is_multipart = headers.get("content-type", "").startswith("multipart/form-data")
        if is_multipart and path.startswith(UPLOAD_PATH):
            return BodyTooLargeError(self._max_upload_bytes, "upload", _MULTIPART_OVERHEAD)
        if is_multipart and path == FILES_PATH:
            return BodyTooLargeError(self._max_batch_file_bytes, "batch-file", _MULTIPART_OVERHEAD)
        return BodyTooLargeError(self._max_body_bytes, "body")


def _counted(receive: Receive, refusal: BodyTooLargeError) -> Receive:
    received = 0

    async def counting() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > refusal.limit:
            raise refusal
        return message

    return counting
