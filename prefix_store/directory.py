"""What tasks and API keys are, kept on this server and kept current with the store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from prefix_store.api_key import ApiKey
from prefix_store.ending import end
from prefix_store.errors import StoreUnavailableError, UnknownKeyError, UnknownTaskError
from prefix_store.lookups import Lookups
from prefix_store.store import PrefixStore
from prefix_store.task import Task
from prefix_store.tenant import PUBLIC

logger = logging.getLogger(__name__)

# A change that no message told of is found within POLL + ANSWER seconds, and so is a store that
# went away; one that came back within RETRY more. Together under a second.
POLL_SECONDS = 0.25
ANSWER_SECONDS = 0.5
RETRY_SECONDS = 0.1


class Directory:
    """Looks a task or a key up in the store once, and again after it changed.

    A message from the store wakes it at each change; it then reads from the log of changes what it
    has not seen yet, and does so without a message too, a few times a second. So what it answers
    is at most a second old, but while the store is away, when it answers what it knows. Use from
    one event loop; start it, and close it at the end.

    Attributes:
        tasks: by name in the store; raises UnknownTaskError.
        keys: by key id; raises UnknownKeyError.
    """

    def __init__(
        self,
        store: PrefixStore,
        *,
        lookup_seconds: float = 5.0,
        on_connected: Callable[[bool], None] = lambda _: None,
        on_changed: Callable[[tuple[str, ...] | None], None] = lambda _: None,
    ) -> None:
        """
        Args:
            lookup_seconds: most seconds that starting, and looking up one name, may take.
            on_connected: told when the store goes away and when it is back.
            on_changed: told which tasks changed; None is that any may have.
        """
        self._store = store
        self._on_connected = on_connected
        self._on_changed = on_changed
        self._connected = False
        self._position: str | None = None
        self._shared: Mapping[str, frozenset[str]] = {}
        self._following: asyncio.Task[None] | None = None
        self._start_seconds = lookup_seconds  # nothing is known yet that could go on without it
        self.tasks: Lookups[Task] = Lookups(
            store.get,
            UnknownTaskError,
            is_connected=lambda: self._connected,
            seconds=lookup_seconds,
        )
        self.keys: Lookups[ApiKey] = Lookups(
            store.keys.get,
            UnknownKeyError,
            is_connected=lambda: self._connected,
            seconds=lookup_seconds,
        )

    @property
    def connected(self) -> bool:
        """False while the store is away, when what is known may be old."""
        return self._connected

    async def start(self) -> None:
        """Begin to follow the store.

        Raises:
            StoreUnavailableError
        """
        await self.catch_up(self._start_seconds)
        self._following = asyncio.create_task(self._follow())

    async def close(self) -> None:
        """Stop following, and look-ups under way."""
        await self.tasks.close()
        await self.keys.close()
        if self._following is not None:
            await end(self._following)

    async def _follow(self) -> None:
        while True:
            try:
                async with self._store.subscribe() as subscription:
                    while True:
                        await self.catch_up()
                        await subscription.wait(POLL_SECONDS)
            except StoreUnavailableError as error:
                self._set_connected(False, str(error))
            except Exception:
                logger.exception("following the store failed; trying again")
                self._set_connected(False, "")
            await asyncio.sleep(RETRY_SECONDS)

    def is_shared(self, task_id: str, tenant: str) -> bool:
        """Whether another tenant's task is shared with this one.

        The store is not asked, so that the time it takes does not tell whether there is the task.
        """
        tenants = self._shared.get(task_id, frozenset())
        return tenant in tenants or PUBLIC in tenants

    def shared_with(self, tenant: str) -> list[str]:
        """The tasks that are shared with a tenant, by name in the store."""
        return sorted(task_id for task_id in self._shared if self.is_shared(task_id, tenant))

    async def catch_up(self, seconds: float = ANSWER_SECONDS) -> None:
        """Forget what changed since the last time.

        Args:
            seconds: most that the store may take to answer.

        Raises:
            StoreUnavailableError
        """
        try:
            async with asyncio.timeout(seconds):
                changes = await self._store.changes(self._position)
                shared = await self._store.shared() if changes.sharing else self._shared
        except TimeoutError as error:
            raise StoreUnavailableError("the prefix store does not answer in time") from error
        _forget(self.tasks, changes.task_ids)
        _forget(self.keys, changes.key_ids)
        self._position = changes.position
        self._shared = shared
        if changes.task_ids is None or changes.task_ids:
            self._on_changed(changes.task_ids)
        self._set_connected(True, "")

    def _set_connected(self, connected: bool, why: str) -> None:
        if connected == self._connected:
            return
        self._connected = connected
        self._on_connected(connected)
        if connected:
            logger.info("following the prefix store; %d tasks are known here", len(self.tasks))
        else:
            logger.warning("the prefix store is away, what is known here goes on: %s", why)


def _forget(lookups: Lookups[Task] | Lookups[ApiKey], names: tuple[str, ...] | None) -> None:
    if names is None:
        lookups.forget_all()
        return
    for name in names:
        lookups.forget(name)
