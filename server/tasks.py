"""Tasks: upload, look up, change, share and delete."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress

from prefix_store.artefact import Artefact
from prefix_store.condition import ALWAYS, Condition
from prefix_store.directory import Directory
from prefix_store.errors import PrefixTooLargeError, StoreUnavailableError, UnknownTaskError
from prefix_store.groups import DECODER
from prefix_store.prefix import Prefix
from prefix_store.quota import Quota
from prefix_store.soft_prompt import SoftPrompt
from prefix_store.store import PrefixStore
from prefix_store.task import Task, TaskRecord
from prefix_store.task_id import check_stored_name, name_for, owner_and_name, stored_name
from prefix_store.tensor_file import Buffer
from prefix_store.upload import read_upload
from prefix_store.validate import check_fits
from server.accounting.book import LimitsBook
from server.accounting.limits import TenantLimits
from server.engine.protocol import Engine
from server.errors import InvalidRequestError
from server.metrics import Metrics
from server.pins import Pins
from server.residency import ResidentPrefixes
from server.tokenization import TextTokenizer


class TaskService:
    """What the routes ask about tasks; a `task_id` is a name of the store's (`stored_name`)."""

    def __init__(
        self,
        store: PrefixStore,
        directory: Directory,
        engine: Engine,
        tokenizer: TextTokenizer,
        metrics: Metrics,
        *,
        prefixes: ResidentPrefixes,
        pins: Pins,
        limits: LimitsBook,
    ) -> None:
        """
        Args:
            directory: follows `store`.
            limits: what tenants may store.
        """
        self._store = store
        self._directory = directory
        self._engine = engine
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._prefixes = prefixes
        self._pins = pins
        self._limits = limits

    @property
    def store_connected(self) -> bool:
        """False while the store is away: known tasks go on, and nothing can be changed."""
        return self._directory.connected

    async def upload(
        self,
        task_id: str,
        files: Sequence[tuple[str, Buffer]],
        *,
        activate: bool = True,
        condition: Condition = ALWAYS,
    ) -> TaskRecord:
        """Store an uploaded prefix: file names and contents. See `PrefixStore.put` for the rest.

        Raises:
            InvalidTaskIdError, InvalidPrefixError, PrefixTooLargeError, UnknownTaskError,
            PreconditionFailedError, QuotaExceededError, EngineFailedError, StoreUnavailableError:
            nothing is stored then.
        """
        check_stored_name(task_id)
        limits = await self._limits_of(task_id)
        upload = await asyncio.to_thread(self._read_upload, files)
        prefix = upload if isinstance(upload, SoftPrompt) else upload.prefix
        _check_length(prefix.prefix_length, limits)
        artefact = await self._compute(upload) if isinstance(upload, SoftPrompt) else upload
        return await self._put(task_id, artefact, limits, activate, condition)

    async def upload_text(
        self, task_id: str, text: str, *, activate: bool = True, condition: Condition = ALWAYS
    ) -> TaskRecord:
        """Run a text through the model and store what it leaves behind as a prefix.

        Raises:
            InvalidTaskIdError, InvalidRequestError, PrefixTooLargeError, UnknownTaskError,
            PreconditionFailedError, QuotaExceededError, EngineFailedError, StoreUnavailableError:
            nothing is stored then.
        """
        check_stored_name(task_id)
        limits = await self._limits_of(task_id)
        token_ids = await self._tokenizer.encode(text)
        longest = self._prefixes.max_prefix_length
        if not 1 <= len(token_ids) <= longest:
            raise InvalidRequestError(
                f"the text has {len(token_ids)} tokens; expected 1 to {longest}"
            )
        _check_length(len(token_ids), limits)
        self._prefixes.check_size(len(token_ids), (DECODER,))
        artefact = await self._compute(token_ids)
        return await self._put(task_id, artefact, limits, activate, condition)

    async def get(self, task_id: str) -> Task:
        """The task now.

        Raises:
            UnknownTaskError, StoreUnavailableError
        """
        async with self._counted():
            return await self._store.get(task_id)

    def read(self, version: str, start: int, stop: int) -> AsyncGenerator[bytes]:
        """See `PrefixStore.stream`."""
        return self._store.stream(version, start, stop)

    async def page(self, tenant: str, limit: int, after: str) -> list[Task]:
        """See `PrefixStore.page`."""
        async with self._counted():
            return await self._store.page(tenant, limit, after)

    async def count(self, tenant: str | None = None) -> int:
        """See `PrefixStore.count`."""
        async with self._counted():
            return await self._store.count(tenant)

    async def activate(self, task_id: str, version: str, condition: Condition = ALWAYS) -> Task:
        """See `PrefixStore.activate`."""
        async with self._changing(task_id):
            return await self._store.activate(task_id, version, condition)

    async def rollback(self, task_id: str, condition: Condition = ALWAYS) -> Task:
        """See `PrefixStore.rollback`."""
        async with self._changing(task_id):
            return await self._store.rollback(task_id, condition)

    async def split(
        self, task_id: str, shares: Mapping[str, int], condition: Condition = ALWAYS
    ) -> Task:
        """See `PrefixStore.split`."""
        async with self._changing(task_id):
            return await self._store.split(task_id, shares, condition)

    async def pin(self, task_id: str, condition: Condition = ALWAYS) -> Task:
        """See `PrefixStore.pin`.

        Raises:
            PinsFullError: it does not fit beside what is pinned already.
        """
        task = await self.get(task_id)
        self._pins.check(task)
        async with self._changing(task_id):
            return await self._store.pin(task_id, True, condition)

    async def unpin(self, task_id: str, condition: Condition = ALWAYS) -> Task:
        """See `PrefixStore.pin`."""
        async with self._changing(task_id):
            return await self._store.pin(task_id, False, condition)

    async def share(
        self, task_id: str, tenants: Sequence[str], condition: Condition = ALWAYS
    ) -> Task:
        """See `PrefixStore.share`; here it holds at once, on every server within a second."""
        async with self._changing(task_id):
            task = await self._store.share(task_id, tenants, condition)
            with suppress(StoreUnavailableError):  # then it holds when the store is back
                await self._directory.catch_up()
            return task

    async def usable(self, tenant: str) -> dict[str, Task]:
        """The tasks that a tenant may use, by what it calls them: its own and those shared.

        Raises:
            StoreUnavailableError
        """
        async with self._counted():
            found = {task.name: task for task in await self._store.list(tenant)}
        for task_id in self._directory.shared_with(tenant):
            name = name_for(tenant, task_id)
            with suppress(UnknownTaskError):
                found.setdefault(name, await self.resolve(tenant, name))
        return found

    async def delete_version(
        self, task_id: str, version: str, condition: Condition = ALWAYS
    ) -> Task:
        """See `PrefixStore.delete_version`; requests that run with it finish."""
        async with self._changing(task_id):
            return await self._store.delete_version(task_id, version, condition)

    async def delete(self, task_id: str, condition: Condition = ALWAYS) -> None:
        """See `PrefixStore.delete`; requests that run with its prefixes finish."""
        async with self._changing(task_id):
            await self._store.delete(task_id, condition)

    async def resolve(self, tenant: str, name: str, *, anew: bool = False) -> Task:
        """The task that a tenant calls so, for a new request; as last known without the store.

        What is another tenant's and not shared is answered like what does not exist, without a
        look at the one or the other.

        Args:
            anew: the store no longer has what was last known.

        Raises:
            InvalidTaskIdError, UnknownTaskError, StoreUnavailableError
        """
        task_id = stored_name(tenant, name)
        is_own = owner_and_name(task_id)[0] == tenant
        if not is_own and not self._directory.is_shared(task_id, tenant):
            raise UnknownTaskError.named(name)
        if anew:
            self._directory.tasks.forget(task_id)
        async with self._counted():
            try:
                return await self._directory.tasks.get(task_id)
            except UnknownTaskError:
                raise UnknownTaskError.named(name) from None

    async def _compute(self, prompt: tuple[int, ...] | SoftPrompt) -> Artefact:
        started = time.perf_counter()
        prefix = await self._engine.compute_prefix(prompt)
        self._metrics.prefix_compute_seconds.observe(time.perf_counter() - started)
        return await asyncio.to_thread(Artefact.of, prefix)

    def _read_upload(self, files: Sequence[tuple[str, Buffer]]) -> Artefact | SoftPrompt:
        upload = read_upload(files, self._engine.spec)
        prefix = upload if isinstance(upload, SoftPrompt) else upload.prefix
        check_fits(prefix, self._engine.spec, self._prefixes.max_prefix_length)
        groups = prefix.groups if isinstance(prefix, Prefix) else (DECODER,)
        self._prefixes.check_size(prefix.prefix_length, groups)
        return upload

    async def _limits_of(self, task_id: str) -> TenantLimits:
        """What the task's tenant may store."""
        return (await self._limits.allowance(owner_and_name(task_id)[0])).tenant

    async def _put(
        self,
        task_id: str,
        artefact: Artefact,
        limits: TenantLimits,
        activate: bool,
        condition: Condition,
    ) -> TaskRecord:
        quota = Quota(nbytes=limits.stored_bytes, tasks=limits.tasks)
        async with self._changing(task_id):
            return await self._store.put(
                task_id, artefact, activate=activate, condition=condition, quota=quota
            )

    @asynccontextmanager
    async def _changing(self, task_id: str) -> AsyncIterator[None]:
        """See to it that this server serves the change from now on."""
        async with self._counted():
            try:
                yield
            finally:
                self._directory.tasks.forget(task_id)

    @asynccontextmanager
    async def _counted(self) -> AsyncIterator[None]:
        try:
            yield
        except StoreUnavailableError:
            self._metrics.store_errors.inc()
            raise


def _check_length(prefix_length: int, limits: TenantLimits) -> None:
    most = limits.prefix_tokens
    if most is not None and prefix_length > most:
        raise PrefixTooLargeError(
            f"the prefix has {prefix_length} positions; this tenant's may have at most {most}"
        )
