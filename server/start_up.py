"""What a start does before requests are taken: keys, demo tasks, warm prefixes."""

from __future__ import annotations

import logging

from prefix_store.admin_key import ADMIN_KEY_ID, ensure_admin_key
from prefix_store.api_key import Scope
from prefix_store.errors import IncompatiblePrefixError, UnknownTaskError
from prefix_store.key_file import take_key
from prefix_store.store import KeyStore
from server.demo_tasks import DEMO_TASKS
from server.residency import ResidentPrefixes
from server.settings import Settings
from server.tasks import TaskService

logger = logging.getLogger(__name__)


async def see_to_keys(settings: Settings, keys: KeyStore) -> None:
    """Take the keys that files name; without one for admins, make it.

    Raises:
        KeyFileError: a file does not hold a key.
        StoreUnavailableError
    """
    if settings.admin_key_file is None:
        await ensure_admin_key(keys, settings.data_dir)
    else:
        await take_key(keys, settings.admin_key_file, ADMIN_KEY_ID, tuple(Scope))
    if settings.metrics_key_file is not None:
        await take_key(keys, settings.metrics_key_file, "metrics", (Scope.METRICS,))


async def warm_up(
    task_ids: tuple[str, ...], tasks: TaskService, prefixes: ResidentPrefixes
) -> None:
    """Load these tasks' prefixes; a name that no task has is only logged."""
    records = []
    for task_id in task_ids:
        try:
            records.append((await tasks.get(task_id)).record)
        except UnknownTaskError:
            logger.warning("warm-up: there is no task %r", task_id)
    await prefixes.warm_up(records)


async def upload_demo_tasks(tasks: TaskService) -> None:
    """Give a store without tasks those demo tasks that fit the base model."""
    if await tasks.count():
        return
    for demo in DEMO_TASKS:
        try:
            await tasks.upload(demo.task_id, [(demo.path.name, demo.path.read_bytes())])
        except IncompatiblePrefixError as error:
            logger.info("left out the demo task %s: %s", demo.task_id, error)
        else:
            logger.info("uploaded the demo task %s", demo.task_id)
