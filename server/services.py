"""Everything a running server holds open, opened and closed in order."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version

from prefix_store.admin_key import ADMIN_KEY_ID, ensure_admin_key
from prefix_store.api_key import Scope
from prefix_store.collector import collecting
from prefix_store.directory import Directory
from prefix_store.errors import IncompatiblePrefixError
from prefix_store.key_file import take_key
from prefix_store.opening import opened_store
from prefix_store.redis_store.durability import Wait
from prefix_store.store import KeyStore
from server.accounting.account import Accounting
from server.accounting.running import running_accounting
from server.audit import AuditLog
from server.authentication import Authenticate, Authenticator, anybody
from server.batches.runner import BatchRunner
from server.batches.store import BatchStore
from server.demo_tasks import DEMO_TASKS
from server.engine.protocol import Engine
from server.engines import BaseModel, start_engine
from server.generation import Generator
from server.keys import KeyService
from server.metrics import Metrics
from server.pins import Pins
from server.residency import ResidentPrefixes
from server.settings import Settings
from server.tasks import TaskService
from server.tokenization import TextTokenizer

logger = logging.getLogger(__name__)

VERSION = version("prefixserve")


@dataclass(frozen=True, slots=True)
class Services:
    """What the routes work with."""

    settings: Settings
    engine: Engine
    tasks: TaskService
    keys: KeyService
    authenticate: Authenticate
    generator: Generator
    tokenizer: TextTokenizer
    metrics: Metrics
    accounting: Accounting
    audit: AuditLog
    batches: BatchRunner
    dtype: str
    device: str

    async def drain(self) -> None:
        """Refuse new work; return when what runs is finished, or at the deadline stopped.

        Batches stop at once: the next start goes on with them.
        """
        await self.batches.close()
        self.generator.drain()
        await self.engine.close(self.settings.drain_seconds)


@asynccontextmanager
async def running_services(settings: Settings, loaded: BaseModel) -> AsyncIterator[Services]:
    """Open the store, the engine and the cache; close them in reverse, also on failure.

    Raises:
        StoreUnavailableError, KeyFileError, ModelLoadError: the server cannot start so.
    """
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(
            opened_store(
                settings.redis_url,
                settings.data_dir,
                answer_seconds=settings.store_timeout_seconds,
                keep_versions=settings.keep_versions,
                wait=Wait(settings.store_wait_replicas, settings.store_wait_aof),
            )
        )
        if settings.auth:
            await _see_to_keys(settings, store.keys)
        metrics = Metrics(settings.max_metric_tasks)
        tokenizer = TextTokenizer(loaded.tokenizer)
        engine = start_engine(settings, loaded, metrics.observe_step)
        stack.push_async_callback(engine.close)
        metrics.watch_engine(engine.stats)
        await stack.enter_async_context(collecting(store))
        prefixes = ResidentPrefixes(
            store,
            engine,
            metrics,
            device_bytes=settings.prefix_cache_bytes,
            host_bytes=0 if engine.reads_host_memory else settings.prefix_host_cache_bytes,
            room_seconds=settings.prefix_room_seconds,
        )
        stack.push_async_callback(prefixes.close)
        pins = Pins(store, prefixes)
        stack.push_async_callback(pins.close)
        directory = Directory(
            store,
            lookup_seconds=settings.store_timeout_seconds,
            on_connected=metrics.store_connected.set,
            on_changed=pins.changed,
        )
        stack.push_async_callback(directory.close)
        await directory.start()
        accounting = await stack.enter_async_context(
            running_accounting(settings, store.connection, metrics)
        )
        audit_log = settings.audit_log or settings.data_dir / "audit.jsonl"
        audit = await stack.enter_async_context(AuditLog(audit_log))
        batch_store = BatchStore(
            settings.data_dir / "batches", tenant_bytes=settings.max_batch_tenant_bytes
        )
        batches = BatchRunner(batch_store)
        stack.push_async_callback(batches.close)
        tasks = TaskService(
            store,
            directory,
            engine,
            tokenizer,
            metrics,
            prefixes=prefixes,
            pins=pins,
            limits=accounting.limiter.book,
        )
        services = Services(
            settings=settings,
            engine=engine,
            tasks=tasks,
            keys=KeyService(store.keys, directory.keys),
            authenticate=Authenticator(directory.keys) if settings.auth else anybody,
            generator=Generator(
                engine,
                tokenizer,
                tasks,
                prefixes,
                metrics,
                accounting=accounting,
                max_beams=min(settings.max_beams, settings.max_slots),
                log_prompts=settings.log_prompts,
            ),
            tokenizer=tokenizer,
            metrics=metrics,
            accounting=accounting,
            audit=audit,
            batches=batches,
            dtype=str(loaded.dtype).removeprefix("torch."),
            device=loaded.device.type,
        )
        metrics.build.info(
            {
                "version": VERSION,
                "model": loaded.spec.name,
                "dtype": services.dtype,
                "device": services.device,
            }
        )
        if settings.demo_tasks and settings.redis_url is None and not await tasks.list():
            await _upload_demo_tasks(tasks)
        await pins.start()
        await _warm_up(settings.warm_up, tasks, prefixes)
        yield services


async def _see_to_keys(settings: Settings, keys: KeyStore) -> None:
    if settings.admin_key_file is None:
        await ensure_admin_key(keys, settings.data_dir)
    else:
        await take_key(keys, settings.admin_key_file, ADMIN_KEY_ID, tuple(Scope))
    if settings.metrics_key_file is not None:
        await take_key(keys, settings.metrics_key_file, "metrics", (Scope.METRICS,))


async def _warm_up(
    task_ids: tuple[str, ...], tasks: TaskService, prefixes: ResidentPrefixes
) -> None:
    if not task_ids:
        return
    known = {task.task_id: task for task in await tasks.list()}
    for unknown in (task_id for task_id in task_ids if task_id not in known):
        logger.warning("warm-up: there is no task %r", unknown)
    await prefixes.warm_up(known[task_id].record for task_id in task_ids if task_id in known)


async def _upload_demo_tasks(tasks: TaskService) -> None:
    for demo in DEMO_TASKS:
        try:
            await tasks.upload(demo.task_id, [(demo.path.name, demo.path.read_bytes())])
        except IncompatiblePrefixError as error:
            logger.info("left out the demo task %s: %s", demo.task_id, error)
        else:
            logger.info("uploaded the demo task %s", demo.task_id)
