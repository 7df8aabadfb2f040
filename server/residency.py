"""Which prefixes are ready for requests: in the engine, and near it in host memory."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import asynccontextmanager

from prefix_store.cache import PrefixCache
from prefix_store.errors import CorruptArtefactError, PrefixStoreError, StoreUnavailableError
from prefix_store.groups import Group
from prefix_store.prefix import Prefix
from prefix_store.store import PrefixStore
from prefix_store.task import TaskRecord
from prefix_store.validate import check_fits
from server.engine.protocol import Engine
from server.metrics import Metrics

logger = logging.getLogger(__name__)

# Loads at once: the cores are the engine's, and each load holds an artefact's bytes meanwhile.
_LOADS = 2
# A request needs a token of prompt and a token to generate beside its prefix.
_ROOM_FOR_TEXT = 2


class ResidentPrefixes:
    """Brings prefixes from the store to the engine, and keeps what is used within two budgets.

    The device tier is what the engine holds. The host tier keeps prefixes in host memory, so that
    one dropped from the device returns without the store; where both are the same memory, its
    budget is 0. Bytes are those of the engine's dtype, whatever the artefact has.
    """

    def __init__(
        self,
        store: PrefixStore,
        engine: Engine,
        metrics: Metrics,
        *,
        device_bytes: int,
        host_bytes: int,
        room_seconds: float,
    ) -> None:
        self._store = store
        self._engine = engine
        self._metrics = metrics
        self._host_bytes = host_bytes
        self._loads = asyncio.Semaphore(_LOADS)
        self._device = PrefixCache(
            self._load,
            engine.drop_prefix,
            max_bytes=device_bytes,
            room_seconds=room_seconds,
            observer=metrics.prefix_tier("device", device_bytes),
        )
        self._host = PrefixCache(
            self._read,
            lambda _: None,
            max_bytes=host_bytes,
            room_seconds=room_seconds,
            observer=metrics.prefix_tier("host", host_bytes),
        )

    @property
    def max_prefix_length(self) -> int:
        """Longest prefix that leaves room for text."""
        return self._engine.max_length - _ROOM_FOR_TEXT

    def check_size(self, prefix_length: int, groups: Collection[Group]) -> None:
        """Refuse a prefix that could never be loaded here.

        Raises:
            PrefixTooLargeError: it takes more memory than there is for all prefixes.
        """
        self._device.check_fits(self._engine.prefix_bytes(prefix_length, groups))

    @asynccontextmanager
    async def lease(self, record: TaskRecord) -> AsyncIterator[None]:
        """Keep a task's prefix where the engine can use it; loaded first if need be.

        Raises:
            UnknownVersionError, CorruptArtefactError, StoreUnavailableError, InvalidPrefixError
            PrefixTooLargeError, CacheFullError: there is no room for it.
        """
        self._host.touch(record.version)
        async with self._device.lease(record.version, self.nbytes(record)):
            yield

    @property
    def max_bytes(self) -> int:
        """Memory for prefixes on the device."""
        return self._device.max_bytes

    @property
    def pinned(self) -> frozenset[str]:
        """The versions that are pinned now."""
        return self._device.pinned

    def nbytes(self, record: TaskRecord) -> int:
        """Memory that a task's prefix takes on the device."""
        return self._engine.prefix_bytes(record.prefix_length, record.groups)

    async def pin(self, record: TaskRecord) -> None:
        """Load a task's prefix and keep it until `unpin`; one call at a time.

        Raises:
            as `lease`; it is not pinned then.
        """
        await self._device.pin(record.version, self.nbytes(record))

    def unpin(self, version: str) -> None:
        """Undo `pin`; a version that is not pinned is ignored."""
        self._device.unpin(version)

    async def warm_up(self, records: Iterable[TaskRecord]) -> None:
        """Load these; what cannot be is logged and left for its first request."""
        records = list(records)
        for number, record in enumerate(records, 1):
            try:
                async with self.lease(record):
                    pass
            except PrefixStoreError as error:
                logger.warning("warm-up: task %s is left out: %s", record.task_id, error)
            if number % 100 == 0 or number == len(records):
                logger.info("warm-up: %d of %d tasks", number, len(records))

    async def close(self) -> None:
        """Drop every loaded prefix; call when no request runs."""
        await self._device.close()
        await self._host.close()

    async def _load(self, version: str, nbytes: int) -> None:
        async with self._prepared(version, nbytes) as prefix:
            await self._engine.load_prefix(version, prefix)

    @asynccontextmanager
    async def _prepared(self, version: str, nbytes: int) -> AsyncIterator[Prefix]:
        if nbytes > self._host_bytes:
            yield await self._read(version, nbytes)
        else:
            async with self._host.lease(version, nbytes) as prefix:
                yield prefix

    async def _read(self, version: str, nbytes: int) -> Prefix:
        async with self._loads:
            try:
                data = await self._store.read(version)
            except StoreUnavailableError:
                self._metrics.store_errors.inc()
                raise
            return await asyncio.to_thread(self._decode, version, data, nbytes)

    def _decode(self, version: str, data: bytearray, nbytes: int) -> Prefix:
        # Checked again: the store may be shared with servers that run another base model.
        prefix = Prefix.from_bytes(data)
        check_fits(prefix, self._engine.spec, self.max_prefix_length)
        if self._engine.prefix_bytes(prefix.prefix_length, prefix.groups) != nbytes:
            raise CorruptArtefactError(
                f"the stored artefact {version} has prefix length {prefix.prefix_length}, and its "
                "task says otherwise; upload the prefix again"
            )
        return self._engine.prepare_prefix(prefix)
