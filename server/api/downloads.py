"""Sends an artefact as it comes from the store."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import Request, Response
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from prefix_store.task import TaskRecord
from server.api.conditions import RangeError, Span, asked_span, etag, names_version
from server.services import Services

_MEDIA_TYPE = "application/octet-stream"


async def download(services: Services, request: Request, record: TaskRecord) -> Response:
    """The artefact or the asked range of it; an error before the first byte is raised."""
    headers = {
        "ETag": etag(record.version),
        "Accept-Ranges": "bytes",
        "Content-Disposition": f'attachment; filename="{record.name}.safetensors"',
    }
    if_none_match = request.headers.getlist("if-none-match")
    if if_none_match and names_version(if_none_match, record.version):
        return Response(status_code=304, headers=headers)
    if_range = request.headers.get("if-range")
    wanted = request.headers.get("range") if if_range in (None, etag(record.version)) else None
    try:
        span = asked_span(wanted, record.nbytes)
    except RangeError:
        headers["Content-Range"] = f"bytes */{record.nbytes}"
        return Response(status_code=416, headers=headers)
    if span is not None:
        headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{record.nbytes}"
    whole = span or Span(0, record.nbytes)
    headers["Content-Length"] = str(whole.stop - whole.start)
    pieces = services.tasks.read(record.version, whole.start, whole.stop)
    first = await anext(pieces)
    return _Pieces(first, pieces, 200 if span is None else 206, headers)


class _Pieces(StreamingResponse):
    """Pieces of bytes; whatever ends the response, reading them has ended with it."""

    def __init__(
        self, first: bytes, rest: AsyncGenerator[bytes], status: int, headers: dict[str, str]
    ) -> None:
        self._rest = rest
        super().__init__(_chain(first, rest), status, headers, media_type=_MEDIA_TYPE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the pieces until they end or the client goes."""
        async with aclosing(self._rest):
            await super().__call__(scope, receive, send)


async def _chain(first: bytes, rest: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    yield first
    async for piece in rest:
        yield piece
