"""What each task is, kept on this server and kept current with the store."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

from prefix_store.ending import end
from prefix_store.errors import StoreUnavailableError, UnknownTaskError
from prefix_store.store import PrefixStore
from prefix_store.task import Task

logger = logging.getLogger(__name__)

MAX_TASKS = 20_000
MAX_UNKNOWN = 20_000
# A change that no message told of is found within POLL + ANSWER seconds, and so is a store that
# went away; one that came back within RETRY more. Together under a second.
POLL_SECONDS = 0.25
ANSWER_SECONDS = 0.5
RETRY_SECONDS = 0.1

T = TypeVar("T")


class TaskDirectory:
    """Looks a task up in the store once, and again after it changed.

    A message from the store wakes it at each change; it then reads from the log of changes what it
    has not seen yet, and does so without a message too, a few times a second. While the store is
    away it answers what it knows. Names of tasks that do not exist are remembered as well. Both
    are bounded: what was not asked for longest is forgotten. Use from one event loop; start it,
    and close it at the end.
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
            lookup_seconds: most seconds that looking up one task may take.
            on_connected: told when the store goes away and when it is back.
            on_changed: told which tasks changed; None is that any may have.
        """
        self._store = store
        self._lookup_seconds = lookup_seconds
        self._on_connected = on_connected
        self._on_changed = on_changed
        self._connected = False
        self._position: str | None = None
        self._tasks: OrderedDict[str, Task] = OrderedDict()  # least recently used first
        self._unknown: OrderedDict[str, UnknownTaskError] = OrderedDict()
        self._lookups: dict[str, asyncio.Task[Task]] = {}
        self._running: set[asyncio.Task[Task]] = set()
        self._following: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        """False while the store is away, when what is known may be old."""
        return self._connected

    async def start(self) -> None:
        """Begin to follow the store.

        Raises:
            StoreUnavailableError
        """
        await self._catch_up()
        self._following = asyncio.create_task(self._follow())

    async def close(self) -> None:
        """Stop following, and look-ups under way."""
        await end(*self._running, *([self._following] if self._following else []))

    async def get(self, task_id: str) -> Task:
        """The task; at most a second old while the store is connected.

        Raises:
            UnknownTaskError: no task of this name.
            StoreUnavailableError: the store is away and the task is not known here.
        """
        task = self._tasks.get(task_id)
        if task is not None:
            self._tasks.move_to_end(task_id)
            return task
        if self._connected and task_id in self._unknown:
            self._unknown.move_to_end(task_id)
            raise self._unknown[task_id].with_traceback(None)
        # Shielded: a request that is cancelled must not take the look-up from the others.
        return await asyncio.shield(self._lookups.get(task_id) or self._look_up(task_id))

    def forget(self, task_id: str) -> None:
        """Look the task up again the next time; what is being looked up is not remembered."""
        self._tasks.pop(task_id, None)
        self._unknown.pop(task_id, None)
        self._lookups.pop(task_id, None)

    def _look_up(self, task_id: str) -> asyncio.Task[Task]:
        running = self._lookups[task_id] = asyncio.create_task(self._fetch(task_id))
        self._running.add(running)
        running.add_done_callback(self._looked_up)
        return running

    def _looked_up(self, running: asyncio.Task[Task]) -> None:
        self._running.discard(running)
        if not running.cancelled():
            running.exception()  # taken here in case every request that waits was cancelled

    async def _fetch(self, task_id: str) -> Task:
        try:
            async with asyncio.timeout(self._lookup_seconds):
                task = await self._store.get(task_id)
        except UnknownTaskError as error:
            if self._is_current(task_id):
                _remember(self._unknown, task_id, error, MAX_UNKNOWN)
            raise
        except TimeoutError as error:
            raise StoreUnavailableError("the prefix store does not answer in time") from error
        else:
            if self._is_current(task_id):
                _remember(self._tasks, task_id, task, MAX_TASKS)
            return task
        finally:
            if self._is_current(task_id):
                del self._lookups[task_id]

    def _is_current(self, task_id: str) -> bool:
        """Whether the look-up that runs was not overtaken by a change."""
        return self._lookups.get(task_id) is asyncio.current_task()

    async def _follow(self) -> None:
        while True:
            try:
                async with self._store.subscribe() as subscription:
                    while True:
                        await self._catch_up()
                        await subscription.wait(POLL_SECONDS)
            except StoreUnavailableError as error:
                self._set_connected(False, str(error))
            except Exception:
                logger.exception("following the store failed; trying again")
                self._set_connected(False, "")
            await asyncio.sleep(RETRY_SECONDS)

    async def _catch_up(self) -> None:
        """Forget what changed since the last time."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                changes = await self._store.changes(self._position)
        except TimeoutError as error:
            raise StoreUnavailableError("the prefix store does not answer in time") from error
        for task_id in self._known() if changes.task_ids is None else changes.task_ids:
            self.forget(task_id)
        self._position = changes.position
        if changes.task_ids is None or changes.task_ids:
            self._on_changed(changes.task_ids)
        self._set_connected(True, "")

    def _known(self) -> list[str]:
        return [*self._tasks, *self._unknown, *self._lookups]

    def _set_connected(self, connected: bool, why: str) -> None:
        if connected == self._connected:
            return
        self._connected = connected
        self._on_connected(connected)
        if connected:
            logger.info("following the prefix store; %d tasks are known here", len(self._tasks))
        else:
            logger.warning("the prefix store is away, what is known here goes on: %s", why)


def _remember(known: OrderedDict[str, T], task_id: str, value: T, most: int) -> None:
    known[task_id] = value
    if len(known) > most:
        known.popitem(last=False)
