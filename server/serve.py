"""`prefixserve serve`: from a command line to a running server and back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shlex
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Generator
from functools import partial

import uvicorn
import uvloop
from starlette.types import ASGIApp

from prefix_store.data_dir import admin_key_file
from prefix_store.errors import PrefixStoreError, UnknownTaskError
from server.api.openai.batch_lines import answer_line
from server.api.request_log import RequestLog
from server.app import create_app
from server.batches.batch_run import Work
from server.demo_tasks import DEMO_TASKS
from server.engines import BaseModel, load_model
from server.errors import StartupError
from server.logs import configure_logging
from server.services import VERSION, Services, running_services
from server.settings import Settings, load_settings
from server.tracing import opened_tracing

logger = logging.getLogger(__name__)

# After the last token: time for answers to reach their clients.
_FLUSH_SECONDS = 5


def main(argv: list[str]) -> None:
    """Serve until SIGTERM or SIGINT, then exit with code 0; 1 where the server cannot start."""
    try:
        settings = load_settings(argv)
        configure_logging(settings.log_level, settings.log_format)
        with bind(settings.host, settings.port) as listener:
            loaded = load_model(settings)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(serve(settings, loaded, listener, _announce))
    except (StartupError, PrefixStoreError, OSError) as error:
        sys.exit(f"prefixserve: {' '.join(str(error).split())}")


async def serve(
    settings: Settings,
    loaded: BaseModel,
    listener: socket.socket,
    on_ready: Callable[[Services, ASGIApp, str], Awaitable[None]],
    stop: asyncio.Event | None = None,
) -> None:
    """Serve on a bound socket until a signal, or until `stop` is set.

    Args:
        on_ready: awaited once requests are answered, with the application, which whoever has
            another way in may call too, and the server's address.
    """
    stop = _stop_on_signals() if stop is None else stop
    async with (
        opened_tracing(settings.otlp_endpoint) as tracing,
        running_services(settings, loaded) as services,
        asyncio.TaskGroup() as group,
    ):
        services.batches.start(_batch_work(services))
        app = RequestLog(create_app(services), tracing)
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=_FLUSH_SECONDS,
        )
        server = _Server(config, lambda: on_ready(services, app, _address(listener)))
        serving = group.create_task(server.serve(sockets=[listener]))
        stopping = group.create_task(stop.wait())
        await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        logger.info("stopping: finishing what runs, for at most %g s", settings.drain_seconds)
        await services.drain()
        server.should_exit = True


def _batch_work(services: Services) -> Work:
    settings = services.settings
    return Work(
        store=services.batches.store,
        answer=partial(answer_line, services),
        is_active=services.keys.is_active,
        places=asyncio.Semaphore(settings.batch_concurrency),
        workers=settings.batch_concurrency,
        max_lines=settings.max_batch_lines,
        max_line_bytes=settings.max_body_bytes,
    )


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handling, which ends the process by the signal."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], Awaitable[None]]) -> None:
        super().__init__(config)
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        await self._on_started()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def bind(host: str, port: int) -> socket.socket:
    """A bound socket; connections are refused until the server listens on it.

    Raises:
        StartupError: the address is taken, or not one of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise StartupError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; choose others with "
            "--host and --port"
        ) from error
    return listener


def _stop_on_signals() -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT; the second one ends the process at once."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def handle() -> None:
        stop.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, handle)
    return stop


def _address(listener: socket.socket) -> str:
    """An address to reach the server at from this machine."""
    host, port = listener.getsockname()[:2]
    own = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
    return f"http://[{own}]:{port}" if ":" in own else f"http://{own}:{port}"


async def _announce(services: Services, _: ASGIApp, address: str) -> None:
    """Tell the operator where the server is and a request that works."""
    body: dict[str, str] = {"inputs": "The capital of France is"}
    for demo in DEMO_TASKS:
        with contextlib.suppress(UnknownTaskError):
            await services.tasks.get(demo.task_id)
            body = {"task_id": demo.task_id, "inputs": demo.example}
            break
    sys.stdout.write(
        f"\nprefixserve {VERSION} serves {services.engine.spec.name} at {address}\n"
        f"Every field and an example: {address}/docs\n\n"
        f"Try it:\n  curl {address}/generate -H 'Content-Type: application/json' "
        f"{_authorization(services.settings)}"
        f"-d {shlex.quote(json.dumps(body, ensure_ascii=False))}\n\n"
    )
    sys.stdout.flush()


def _authorization(settings: Settings) -> str:
    """The part of a curl command that brings the key."""
    if not settings.auth:
        return ""
    path = settings.admin_key_file or admin_key_file(settings.data_dir)
    key = f"$(cat {shlex.quote(str(path))})" if path.exists() else "$PREFIXSERVE_API_KEY"
    return f'-H "Authorization: Bearer {key}" '
