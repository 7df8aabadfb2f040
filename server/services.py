"""Everything a running server holds open, opened and closed in order."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version

from prefix_store.collector import collecting
from prefix_store.directory import Directory
from prefix_store.opening import opened_store
from prefix_store.redis_store import RedisPrefixStore
from prefix_store.redis_store.durability import Wait
from server.accounting.account import Accounting
from server.accounting.running import running_accounting
from server.audit import AuditLog
from server.authentication import Authenticate, Authenticator, anybody
from server.batches.runner import BatchRunner
from server.batches.store import BatchStore
from server.engine.protocol import Engine
from server.engines import BaseModel, start_engine
from server.generator import Generator
from server.keys import KeyService
from server.metrics import Metrics
from server.pins import Pins
from server.residency import ResidentPrefixes
from server.settings import Settings
from server.start_up import see_to_keys, upload_demo_tasks, warm_up
from server.tasks import TaskService
from server.tokenization import TextTokenizer

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
        store = await stack.enter_async_context(_opened_store(settings))
        if settings.auth:
            await see_to_keys(settings, store.keys)
        metrics = Metrics(settings.max_metric_tasks)
        engine = start_engine(settings, loaded, metrics.observe_step)
        stack.push_async_callback(engine.close)
        metrics.watch_engine(engine.stats)
        await stack.enter_async_context(collecting(store))
        prefixes = _resident_prefixes(settings, store, engine, metrics)
        stack.push_async_callback(prefixes.close)
        pins = Pins(store, prefixes)
        stack.push_async_callback(pins.close)
        directory = _directory(settings, store, metrics, pins)
        stack.push_async_callback(directory.close)
        await directory.start()
        accounting = await stack.enter_async_context(
            running_accounting(settings, store.connection, metrics)
        )
        audit_log = settings.audit_log or settings.data_dir / "audit.jsonl"
        audit = await stack.enter_async_context(AuditLog(audit_log))
        batches = _batches(settings)
        stack.push_async_callback(batches.close)
        tokenizer = TextTokenizer(loaded.tokenizer)
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
        generator = Generator(
            engine,
            tokenizer,
            tasks,
            prefixes,
            metrics,
            accounting=accounting,
            max_beams=min(settings.max_beams, settings.max_slots),
            log_prompts=settings.log_prompts,
        )
        services = Services(
            settings=settings,
            engine=engine,
            tasks=tasks,
            keys=KeyService(store.keys, directory.keys),
            authenticate=Authenticator(directory.keys) if settings.auth else anybody,
            generator=generator,
            tokenizer=tokenizer,
            metrics=metrics,
            accounting=accounting,
            audit=audit,
            batches=batches,
            dtype=str(loaded.dtype).removeprefix("torch."),
            device=loaded.device.type,
        )
        metrics.build.info(_build(services))
        if settings.demo_tasks and settings.redis_url is None:
            await upload_demo_tasks(tasks)
        await pins.start()
        await warm_up(settings.warm_up, tasks, prefixes)
        yield services


def _opened_store(settings: Settings) -> AbstractAsyncContextManager[RedisPrefixStore]:
    return opened_store(
        settings.redis_url,
        settings.data_dir,
        answer_seconds=settings.store_timeout_seconds,
        keep_versions=settings.keep_versions,
        wait=Wait(settings.store_wait_replicas, settings.store_wait_aof),
    )


def _resident_prefixes(
    settings: Settings, store: RedisPrefixStore, engine: Engine, metrics: Metrics
) -> ResidentPrefixes:
    return ResidentPrefixes(
        store,
        engine,
        metrics,
        device_bytes=settings.prefix_cache_bytes,
        host_bytes=0 if engine.reads_host_memory else settings.prefix_host_cache_bytes,
        room_seconds=settings.prefix_room_seconds,
    )


def _directory(
    settings: Settings, store: RedisPrefixStore, metrics: Metrics, pins: Pins
) -> Directory:
    return Directory(
        store,
        lookup_seconds=settings.store_timeout_seconds,
        on_connected=metrics.store_connected.set,
        on_changed=pins.changed,
    )


def _batches(settings: Settings) -> BatchRunner:
    store = BatchStore(settings.data_dir / "batches", tenant_bytes=settings.max_batch_tenant_bytes)
    return BatchRunner(store)


def _build(services: Services) -> dict[str, str]:
    return {
        "version": VERSION,
        "model": services.engine.spec.name,
        "dtype": services.dtype,
        "device": services.device,
    }
