"""Replicas of `prefixserve serve` in a Ray cluster, behind Ray Serve's proxies.

    serve run deploy.ray.app:build flags="--model /models/llama-8b" max_replicas=8

A request goes to a replica that has answered for its task, by Ray's model multiplexing, and to
another one where that is full. docs/scaling.md says what to set on the cluster's machines.
"""

import asyncio
import shlex

from pydantic import BaseModel, NonNegativeFloat, PositiveInt
from ray import serve
from ray.exceptions import TaskCancelledError
from ray.serve.config import AutoscalingConfig
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.ray.proxy import REPLICA_HEADER
from server.engines import load_model
from server.errors import StartupError
from server.logs import configure_logging
from server.request_context import current_request
from server.serve import bind
from server.serve import serve as serve_alone
from server.services import Services
from server.settings import Settings, load_settings

_HEALTH_CHECK_SECONDS = 2  # how long a dead replica may go unnoticed
_KILL_SECONDS = 10  # for what a replica does after its last request


class Arguments(BaseModel, extra="forbid"):
    """What `serve run` and Ray Serve's configuration files may say.

    Attributes:
        flags: those of `prefixserve serve`; variables and a settings file do as well.
        num_cpus, num_gpus: of a replica; the engine has a thread for each CPU.
        tasks_per_replica: how many tasks' prefixes a replica has room for.
    """

    flags: str = ""
    min_replicas: PositiveInt = 2
    max_replicas: PositiveInt = 2
    num_cpus: PositiveInt = 1
    num_gpus: NonNegativeFloat = 0
    tasks_per_replica: PositiveInt = 1000


def build(args: Arguments) -> serve.Application:
    """The application, scaled so that half of the replicas' slots are in use.

    Raises:
        StartupError: a flag is wrong, or one is missing.
    """
    settings = replica_settings(args)
    deployment = serve.deployment(
        name="prefixserve",
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus},
        autoscaling_config=AutoscalingConfig(
            min_replicas=args.min_replicas,
            max_replicas=args.max_replicas,
            target_ongoing_requests=settings.max_slots / 2,
        ),
        max_ongoing_requests=settings.max_slots,
        max_queued_requests=max(1, settings.max_waiting),
        graceful_shutdown_timeout_s=settings.drain_seconds + _KILL_SECONDS,
        health_check_period_s=_HEALTH_CHECK_SECONDS,
        logging_config={"enable_access_log": False},  # the server has its own
    )
    return deployment(serve.ingress()(Replica)).bind(args)


def replica_settings(args: Arguments, rank: int = 0) -> Settings:
    """The settings of a replica; `rank` is which of the replicas it is, from 0.

    Raises:
        StartupError: a flag is wrong, or one is missing.
    """
    settings = load_settings(shlex.split(args.flags))
    if settings.redis_url is None:
        raise StartupError("replicas share a store: set --redis-url or PREFIXSERVE_REDIS_URL")
    if not (settings.auth or settings.allow_unauthenticated):
        raise StartupError(
            "--no-auth lets everybody who reaches Ray's proxies do everything; leave it out, or "
            "say --allow-unauthenticated"
        )
    port = settings.port and settings.port + 1 + rank
    return settings.model_copy(update={"port": port})


class Replica:
    """A server as `prefixserve serve` starts it, which Ray's proxies are another way into.

    Its own address is for Prometheus, and for batches, whose files are on its disk.
    """

    def __init__(self, args: Arguments) -> None:
        self._args = args
        self._stop = asyncio.Event()
        self._serving: asyncio.Task[None] | None = None
        self._services: Services | None = None

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """Start; what Ray calls with each request."""
        context = serve.get_replica_context()
        rank = context.rank.rank
        settings = replica_settings(self._args, rank)
        configure_logging(settings.log_level, settings.log_format)
        listener = bind(settings.host, settings.port)
        # The model's conversion is shared by the replicas of a machine, everything else is not.
        loaded = await asyncio.to_thread(load_model, settings)
        own = settings.model_copy(update={"data_dir": settings.data_dir / f"replica-{rank}"})
        ready: asyncio.Future[ASGIApp] = asyncio.get_running_loop().create_future()

        async def on_ready(services: Services, app: ASGIApp, _: str) -> None:
            self._services = services
            ready.set_result(app)

        self._serving = asyncio.create_task(
            serve_alone(own, loaded, listener, on_ready, self._stop)
        )
        await asyncio.wait((ready, self._serving), return_when=asyncio.FIRST_COMPLETED)
        if self._serving.done():
            self._serving.result()
        return _Holding(await ready, context.replica_tag, self._args.tasks_per_replica)

    def check_health(self) -> None:
        """Ray replaces a replica where this fails."""
        if self._services is not None and not self._services.engine.is_alive:
            raise RuntimeError("the engine has stopped; the replica's log says why")

    async def __del__(self) -> None:
        """What Ray calls when nothing runs any more."""
        self._stop.set()
        if self._serving is not None:
            await self._serving


class _Holding:
    """Tells Ray which tasks this replica has answered for, whose prefixes it therefore has."""

    def __init__(self, app: ASGIApp, replica: str, tasks: int) -> None:
        self._app = app
        self._replica = replica

        # Nothing is loaded here, where one load would wait for another: the request has done it.
        async def hold(task_id: str) -> str:
            return task_id

        self._hold = serve.multiplexed(max_num_models_per_replica=tasks)(hold)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REPLICA_HEADER] = self._replica
                task = current_request().facts.get("task")
                if message["status"] == 200 and isinstance(task, str):
                    await self._hold(task)
            await send(message)

        async def hear() -> Message:
            try:
                return await receive()
            except TaskCancelledError:  # so Ray says that the client has gone
                return {"type": "http.disconnect"}

        await self._app(scope, hear, tell)
