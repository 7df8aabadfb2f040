"""A real HTTP server that answers as it is told: refusals, delays and broken connections."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Step = Callable[[BaseHTTPRequestHandler], None]


class FaultyServer:
    """Answers the nth request with the nth step.

    Attributes:
        url: where it listens.
        requests: method, path, headers and body of each request so far.
        closing: set when the server goes; a step that stalls waits for it.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []
        self.closing = threading.Event()
        self._steps: list[Step] = []

    def script(self, *steps: Step) -> None:
        """Set what comes next."""
        self._steps = list(steps)

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        headers = {name.lower(): value for name, value in handler.headers.items()}
        body = handler.rfile.read(int(headers.get("content-length", 0)))
        self.requests.append((handler.command, handler.path, headers, body))
        self._steps.pop(0)(handler)

    def stall(self, _: BaseHTTPRequestHandler) -> None:
        """Never answer."""
        self.closing.wait()


@contextmanager
def faulty_server() -> Iterator[FaultyServer]:
    """A server on a free port of loopback."""

    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            faulty.handle(self)

        do_GET = do_POST = do_PUT = do_DELETE = _handle  # noqa: N815 - http.server's names

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        faulty = FaultyServer(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield faulty
        finally:
            faulty.closing.set()
            server.shutdown()
            thread.join()


def answer(status: int, body: object, **headers: str) -> Step:
    """A complete JSON answer; `retry_after` as a keyword is the header Retry-After."""
    return _raw(status, json.dumps(body).encode(), "application/json", headers)


def refuse(status: int, message: str = "no", error_type: str = "kind", **headers: str) -> Step:
    """An error in the server's shape."""
    return answer(status, {"error": message, "error_type": error_type}, **headers)


def events(*data: object, after: bytes = b"", then: Step | None = None) -> Step:
    """A stream of events, then whatever bytes, then another step, then the connection's end."""
    body = b"".join(b"data:" + json.dumps(item).encode() + b"\n\n" for item in data)
    begin = _raw(200, body + after, "text/event-stream", {}, length=None)

    def step(handler: BaseHTTPRequestHandler) -> None:
        begin(handler)
        if then is not None:
            then(handler)

    return step


def text(body: str) -> Step:
    """A complete answer in plain text."""
    return _raw(200, body.encode(), "text/plain", {})


def truncated(status: int) -> Step:
    """An answer that breaks off in its body."""
    return _raw(status, b'{"generated', "application/json", {}, length=1000)


def page(status: int) -> Step:
    """What a server that is not prefixserve says."""
    return _raw(status, b"<html>hello</html>", "text/html", {})


def drop(handler: BaseHTTPRequestHandler) -> None:
    """Close the connection without a byte."""
    handler.close_connection = True


def _raw(
    status: int, body: bytes, content_type: str, headers: dict[str, Any], length: int | None = -1
) -> Step:
    def step(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", content_type)
        if length is not None:
            handler.send_header("Content-Length", str(len(body) if length == -1 else length))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return step
