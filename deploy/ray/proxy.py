"""What Ray Serve's proxies do with a request before they choose a replica, and with Ray's errors.

They find it by RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=deploy.ray.proxy.middlewares in their
environment.
"""

import json
import re
from http import HTTPStatus
from urllib.parse import unquote

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REPLICA_HEADER = "x-replica"
"""In every answer of a replica: which one it was."""

_TASK = re.compile(r"([A-Za-z0-9._-]{1,128}/)?[A-Za-z0-9._-]{1,128}")
_OF_ONE_REPLICA = re.compile(r"/(metrics|v1/files|v1/batches)(/.*)?", re.DOTALL)
_READ_BY_RAY = ("serve_multiplexed_model_id", "serve-multiplexed-model-id", "x-session-id")
_FULL = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)


def middlewares() -> list[Middleware]:
    """What Ray calls in each proxy."""
    return [Middleware(TaskRouting)]


class TaskRouting:
    """Tells Ray the task of a request as a model's id, and clients what to do about Ray's errors.

    The header X-Task-Id chooses a replica and nothing else: the task is what the body says.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, unless it is about what one replica has and the others have not."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif _OF_ONE_REPLICA.fullmatch(scope["path"]):
            text = f"{scope['path']} is of each replica alone; ask one at its own address"
            await _send_error(scope, send, HTTPStatus.MISDIRECTED_REQUEST, "not_here", text)
        else:
            _name_model(MutableHeaders(scope=scope))
            answer = _Answer(scope, send)
            await self._app(scope, receive, answer.send)
            await answer.end()


def _name_model(headers: MutableHeaders) -> None:
    """Name the task where Ray looks; without headers that it would fail to decode."""
    for name in _READ_BY_RAY:
        del headers[name]
    if not headers.get("x-request-id", "").isascii():
        del headers["x-request-id"]
    task = unquote(headers.get("x-task-id", ""))
    if _TASK.fullmatch(task):
        headers["serve_multiplexed_model_id"] = task


class _Answer:
    """An answer on its way out. One that comes from no replica is Ray's own."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope = scope
        self._send = send
        self._started = self._replaced = False

    async def send(self, message: Message) -> None:
        """Send a message on, unless it is Ray's that all replicas are full."""
        if message["type"] == "http.response.start":
            self._started = True
            headers = MutableHeaders(scope=message)
            if REPLICA_HEADER in headers:
                headers["x-request-id"] = headers["x-request-id"]  # Ray has added it once more
            elif message["status"] in _FULL:
                self._replaced = True
                await self._send_unavailable("every replica is full; ask again")
        if not self._replaced:
            await self._send(message)

    async def end(self) -> None:
        """Where a replica dies, Ray does not answer at all."""
        if not self._started:
            await self._send_unavailable("the replica that had the request has died; ask again")

    async def _send_unavailable(self, text: str) -> None:
        status = HTTPStatus.SERVICE_UNAVAILABLE
        await _send_error(self._scope, self._send, status, "unavailable", text)


async def _send_error(
    scope: Scope, send: Send, status: HTTPStatus, error_type: str, text: str
) -> None:
    """Answer as the server answers its errors."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    of_openai = {"message": text, "type": kind, "param": None, "code": error_type}
    own = {"error": text, "error_type": error_type}
    body = json.dumps({"error": of_openai} if scope["path"].startswith("/v1/") else own).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": status.value, "headers": headers})
    await send({"type": "http.response.body", "body": body})
