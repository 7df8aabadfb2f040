"""Tasks: upload, look up, delete, and have a prefix ready while a request runs."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from prefix_store.artefact import Artefact
from prefix_store.cache import PrefixCache
from prefix_store.errors import StoreUnavailableError, UnknownTaskError
from prefix_store.prefix import Prefix
from prefix_store.store import PrefixStore, TaskRecord
from prefix_store.task_id import check_task_id
from prefix_store.upload import read_upload
from prefix_store.validate import check_fits
from server.engine.protocol import Engine
from server.errors import InvalidRequestError
from server.metrics import Metrics
from server.tokenization import TextTokenizer

_MAX_REMEMBERED = 10_000
# A request needs a token of prompt and a token to generate beside its prefix.
_ROOM_FOR_TEXT = 2


class TaskService:
    """What the routes ask about tasks.

    Remembers what each task pointed at when last looked up, so that tasks whose prefix is loaded
    go on while the store is away.
    """

    def __init__(
        self,
        store: PrefixStore,
        engine: Engine,
        tokenizer: TextTokenizer,
        metrics: Metrics,
        *,
        cache_bytes: int,
        lookup_seconds: float,
    ) -> None:
        """
        Args:
            cache_bytes: budget for loaded prefixes.
            lookup_seconds: most seconds that a request's look-up of its task may take.
        """
        self._store = store
        self._engine = engine
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._lookup_seconds = lookup_seconds
        self._remembered: OrderedDict[str, TaskRecord] = OrderedDict()
        self._cache = PrefixCache(self._load, engine.drop_prefix, cache_bytes, metrics.prefix_cache)

    @property
    def max_prefix_length(self) -> int:
        """Longest prefix that leaves room for text."""
        return self._engine.max_length - _ROOM_FOR_TEXT

    async def upload(self, task_id: str, files: Sequence[tuple[str, bytes]]) -> TaskRecord:
        """Store an uploaded prefix: file names and contents.

        Raises:
            InvalidTaskIdError, InvalidPrefixError, StoreUnavailableError: nothing is stored then.
        """
        check_task_id(task_id)
        return await self._put(task_id, await asyncio.to_thread(self._read_upload, files))

    async def upload_text(self, task_id: str, text: str) -> TaskRecord:
        """Run a text through the model and store what it leaves behind as a prefix.

        Raises:
            InvalidTaskIdError, InvalidRequestError, QueueFullError, StoreUnavailableError: nothing
            is stored then.
        """
        check_task_id(task_id)
        token_ids = await self._tokenizer.encode(text)
        if not 1 <= len(token_ids) <= self.max_prefix_length:
            raise InvalidRequestError(
                f"the text has {len(token_ids)} tokens; expected 1 to {self.max_prefix_length}"
            )
        started = time.perf_counter()
        prefix = await self._engine.compute_prefix(token_ids)
        self._metrics.prefix_cache.computed(time.perf_counter() - started)
        await asyncio.to_thread(check_fits, prefix, self._engine.spec, self.max_prefix_length)
        return await self._put(task_id, prefix)

    async def get(self, task_id: str) -> TaskRecord:
        """What the task points at now.

        Raises:
            UnknownTaskError, StoreUnavailableError
        """
        async with self._counted():
            return (await self._store.get(check_task_id(task_id))).record

    async def read(self, task_id: str) -> tuple[TaskRecord, bytes]:
        """The task and its artefact's bytes.

        Raises:
            UnknownTaskError, StoreUnavailableError
        """
        async with self._counted():
            record = (await self._store.get(check_task_id(task_id))).record
            return record, bytes(await self._store.read(record.version))

    async def list(self) -> list[TaskRecord]:
        """Every task, by name.

        Raises:
            StoreUnavailableError
        """
        async with self._counted():
            return [task.record for task in await self._store.list()]

    async def delete(self, task_id: str) -> None:
        """Forget the task; requests that run with its prefix finish.

        Raises:
            UnknownTaskError, StoreUnavailableError
        """
        async with self._counted():
            await self._store.delete(check_task_id(task_id))
        self._remembered.pop(task_id, None)

    async def resolve(self, task_id: str) -> TaskRecord:
        """What a new request of this task runs with; as last known while the store is away.

        Raises:
            UnknownTaskError, StoreUnavailableError
        """
        check_task_id(task_id)
        try:
            async with self._counted(), asyncio.timeout(self._lookup_seconds):
                record = (await self._store.get(task_id)).record
        except UnknownTaskError:
            self._remembered.pop(task_id, None)
            raise
        except (StoreUnavailableError, TimeoutError) as error:
            remembered = self._remembered.get(task_id)
            if remembered is not None:
                return remembered
            raise StoreUnavailableError(str(error) or "the prefix store does not answer") from error
        self._remember(record)
        return record

    def lease(self, version: str) -> AbstractAsyncContextManager[Prefix]:
        """Keep a prefix where the engine can use it; loaded first if need be.

        Raises:
            UnknownVersionError, CorruptArtefactError, StoreUnavailableError, InvalidPrefixError
        """
        return self._cache.lease(version)

    async def close(self) -> None:
        """Drop every loaded prefix; call when no request runs."""
        await self._cache.close()

    async def _load(self, version: str) -> Prefix:
        async with self._counted():
            data = await self._store.read(version)
        prefix = await asyncio.to_thread(self._read_artefact, data)
        await self._engine.load_prefix(version, prefix)
        return prefix

    def _read_artefact(self, data: bytearray) -> Prefix:
        # Checked again: the store may be shared with servers that run another base model.
        prefix = Prefix.from_bytes(data)
        check_fits(prefix, self._engine.spec, self.max_prefix_length)
        return prefix

    def _read_upload(self, files: Sequence[tuple[str, bytes]]) -> Prefix:
        prefix = read_upload(files, self._engine.spec)
        check_fits(prefix, self._engine.spec, self.max_prefix_length)
        return prefix

    async def _put(self, task_id: str, prefix: Prefix) -> TaskRecord:
        artefact = await asyncio.to_thread(Artefact.of, prefix)
        async with self._counted():
            record = await self._store.put(task_id, artefact)
        self._remember(record)
        return record

    def _remember(self, record: TaskRecord) -> None:
        self._remembered[record.task_id] = record
        self._remembered.move_to_end(record.task_id)
        if len(self._remembered) > _MAX_REMEMBERED:
            self._remembered.popitem(last=False)

    @asynccontextmanager
    async def _counted(self) -> AsyncIterator[None]:
        try:
            yield
        except (StoreUnavailableError, TimeoutError):
            self._metrics.store_errors.inc()
            raise
