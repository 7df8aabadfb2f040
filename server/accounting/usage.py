"""Tokens by tenant, task and day: counted here as they are told, kept in Redis."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path

from prefix_store.ending import end
from prefix_store.errors import StoreUnavailableError
from server.accounting.usage_store import UsageStore
from server.accounting.usage_types import BASE, Batch, Entry, Quantity, UsageRow, rows_of
from server.accounting.usage_unsent import UnsentFiles

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 1.0


def today() -> date:
    """The day it is, in UTC."""
    return datetime.now(UTC).date()


class UsageLedger:
    """Adds up what is used, and sends the sums to Redis every second.

    What Redis has not acknowledged is kept and sent again as the same numbered batch, which Redis
    applies once. What is left when the server stops goes to a file, and the next one sends it. Use
    from one event loop; start it, and close it at the end.
    """

    def __init__(
        self,
        store: UsageStore,
        folder: Path,
        *,
        day: Callable[[], date] = today,
        flush_seconds: float = FLUSH_SECONDS,
    ) -> None:
        """
        Args:
            folder: where what was not sent is kept.
        """
        self._store = store
        self._files = UnsentFiles(folder)
        self._day = day
        self._flush_seconds = flush_seconds
        self._sender = secrets.token_hex(8)
        self._number = 0
        self._counts: Counter[Entry] = Counter()
        self._unsent: list[Batch] = []
        self._sending = asyncio.Lock()
        self._flushing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take over what an earlier server could not send, and begin to send."""
        self._unsent = await asyncio.to_thread(self._files.read)
        self._flushing = asyncio.create_task(self._flush_often())

    async def close(self) -> None:
        """Send what is left, or else keep it in a file."""
        if self._flushing is not None:
            await end(self._flushing)
        try:
            await self.flush()
        except StoreUnavailableError as error:
            self._seal()
            await asyncio.to_thread(self._files.write, self._unsent)
            logger.warning("usage that could not be sent is kept for the next start: %s", error)

    def add(self, tenant: str, task_id: str | None, quantity: Quantity, count: int) -> None:
        """Count something today; None is the bare base model."""
        self._counts[Entry(self._day(), tenant, task_id or BASE, quantity)] += count

    async def flush(self) -> None:
        """Send everything counted until now.

        Raises:
            StoreUnavailableError: it will be sent again.
        """
        async with self._sending:
            # A batch that may have arrived must not grow; what is counted meanwhile is the next.
            while self._unsent or self._seal():
                await self._store.apply(self._unsent[0])
                sent = self._unsent.pop(0)
                if sent.sender != self._sender:
                    await asyncio.to_thread(self._files.remove, sent)

    async def report(
        self, first: date, last: date, *, tenant: str | None = None, task_id: str | None = None
    ) -> list[UsageRow]:
        """What was used on each day, of everything that this server counted and of everything that
        others sent.

        Raises:
            StoreUnavailableError
        """
        await self.flush()
        return rows_of(await self._store.read(first, last), tenant, task_id)

    def _seal(self) -> bool:
        """Make a batch of what is counted; False where nothing is."""
        if not self._counts:
            return False
        self._number += 1
        self._unsent.append(Batch(self._sender, self._number, dict(self._counts)))
        self._counts.clear()
        return True

    async def _flush_often(self) -> None:
        while True:
            await asyncio.sleep(self._flush_seconds)
            try:
                await self.flush()
            except StoreUnavailableError as error:
                logger.debug("usage waits for the store: %s", error)
            except Exception:
                logger.exception("sending usage failed; trying again")
