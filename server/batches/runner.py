"""Runs batches: of each tenant one at a time, in order, over restarts of the server."""

from __future__ import annotations

import asyncio
import logging
from contextlib import closing
from dataclasses import dataclass, field

from server.batches.batch_run import BatchFailedError, BatchRun, Work
from server.batches.input_file import numbered_lines
from server.batches.records import BatchRecord, Counts, Status, new_id, now
from server.batches.store import BatchStore
from server.callers import Caller
from server.errors import InvalidRequestError

logger = logging.getLogger(__name__)

WINDOW_SECONDS = 24 * 60 * 60
"""After it a batch expires."""


@dataclass(slots=True)
class _Running:
    """A batch whose turn it is."""

    batch_id: str
    run: BatchRun | None = None
    lines: asyncio.Task[None] | None = None


@dataclass(slots=True)
class BatchRunner:
    """What the routes ask about batches. Nothing runs before `start` or after `close`."""

    store: BatchStore
    _work: Work | None = None
    _turns: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _running: dict[str, _Running] = field(default_factory=dict)

    def start(self, work: Work) -> None:
        """Go on with every batch that has not ended, and from now on run new ones."""
        self._work = work
        for batch in self.store.unfinished():
            self._wake(batch.tenant)

    async def close(self) -> None:
        """Stop at once; lines under way are left undone, for the next start."""
        self._work = None
        turns = list(self._turns.values())
        for turn in turns:
            turn.cancel()
        await asyncio.gather(*turns, return_exceptions=True)

    def create(
        self, caller: Caller, input_id: str, endpoint: str, metadata: dict[str, str] | None
    ) -> BatchRecord:
        """A new batch, which runs when it is its turn.

        Raises:
            UnknownBatchError: the caller's tenant has no such file.
            InvalidRequestError: it is not for batches.
            TooManyBatchesError: as many wait already as may.
        """
        file = self.store.file(caller.tenant, input_id)
        if file.purpose != "batch":
            raise InvalidRequestError(
                f"the file {input_id} has the purpose {file.purpose!r}; expected 'batch'"
            )
        self.store.make_room(caller.tenant)
        batch = BatchRecord(
            id=new_id("batch"),
            tenant=caller.tenant,
            key_id=caller.key_id,
            scopes=caller.scopes,
            endpoint=endpoint,
            input_id=input_id,
            output_id=new_id("file"),
            error_id=new_id("file"),
            expires_at=now() + WINDOW_SECONDS,
            metadata=metadata,
            times={Status.VALIDATING: now()},
        )
        self.store.save(batch)
        self._wake(caller.tenant)
        return batch

    def cancel(self, tenant: str, batch_id: str) -> BatchRecord:
        """End a batch; what is done of it is kept.

        Raises:
            UnknownBatchError: the tenant has none of this name.
            InvalidRequestError: it has ended.
        """
        batch = self.store.batch(tenant, batch_id)
        if batch.status.is_final:
            raise InvalidRequestError(f"the batch is {batch.status}; there is nothing to cancel")
        if batch.status is not Status.CANCELLING:
            batch = self.store.save(batch.at(Status.CANCELLING))
        running = self._running.get(tenant)
        if running is None or running.batch_id != batch_id:
            return self._finish(batch, Status.CANCELLED, batch.counts)
        if running.lines is not None:
            running.lines.cancel()
        return batch

    def counts(self, batch: BatchRecord) -> Counts:
        """How far a batch is now."""
        running = self._running.get(batch.tenant)
        if running is None or running.run is None or running.batch_id != batch.id:
            return batch.counts
        return running.run.counts

    def _wake(self, tenant: str) -> None:
        if self._work is not None and tenant not in self._turns:
            self._turns[tenant] = asyncio.create_task(self._take_turns(tenant))

    async def _take_turns(self, tenant: str) -> None:
        try:
            while self._work is not None and (batch := self._next(tenant)) is not None:
                self._running[tenant] = _Running(batch.id)
                await self._run(self._work, batch, self._running[tenant])
        finally:
            self._running.pop(tenant, None)
            del self._turns[tenant]

    def _next(self, tenant: str) -> BatchRecord | None:
        return next((b for b in self.store.unfinished() if b.tenant == tenant), None)

    async def _run(self, work: Work, batch: BatchRecord, running: _Running) -> None:
        """Run a batch to its end, whatever that is; nothing but a cancellation is raised."""
        try:
            await self._run_lines(work, batch, running)
            status, failure = Status.COMPLETED, None
        except TimeoutError:
            status, failure = Status.EXPIRED, None
        except BatchFailedError as error:
            status, failure = Status.FAILED, str(error)
        except FileNotFoundError:
            status, failure = Status.FAILED, "the batch's input file was deleted before its end"
        except asyncio.CancelledError:
            if self._work is None:
                raise
            status, failure = Status.CANCELLED, None
        except Exception:
            logger.exception("the batch %s failed", batch.id)
            status, failure = Status.FAILED, "the server failed on this batch; its log says why"
        counts = batch.counts if running.run is None else running.run.counts
        current = self.store.batch(batch.tenant, batch.id)
        if current.status is Status.CANCELLING:
            status, failure = Status.CANCELLED, None
        self._finish(current, status, counts, failure)

    async def _run_lines(self, work: Work, batch: BatchRecord, running: _Running) -> None:
        if batch.status is Status.CANCELLING:
            return
        total = batch.counts.total or await asyncio.to_thread(_count, work, batch)
        batch = self.store.batch(batch.tenant, batch.id)
        if batch.status is Status.CANCELLING:
            return
        if batch.status is Status.VALIDATING:
            batch = self.store.save(batch.at(Status.IN_PROGRESS, counts=Counts(total=total)))
        with closing(BatchRun(work, batch, total)) as running.run:
            running.lines = asyncio.create_task(running.run.run())
            await running.lines

    def _finish(
        self, batch: BatchRecord, status: Status, counts: Counts, failure: str | None = None
    ) -> BatchRecord:
        """Give the tenant the results, and end the batch."""
        if status is Status.COMPLETED:
            batch = self.store.save(batch.at(Status.FINALIZING))
        tenant, store = batch.tenant, self.store
        has_output = store.publish(batch.output_id, tenant, f"{batch.id}_output.jsonl")
        has_errors = store.publish(batch.error_id, tenant, f"{batch.id}_error.jsonl")
        return store.save(
            batch.at(
                status,
                counts=counts,
                failure=failure,
                has_output=has_output,
                has_errors=has_errors,
            )
        )


def _count(work: Work, batch: BatchRecord) -> int:
    """The lines of a batch's file.

    Raises:
        BatchFailedError: there are none, or too many.
    """
    path = work.store.path(batch.input_id)
    total = sum(1 for _ in numbered_lines(path, work.max_line_bytes))
    if not 0 < total <= work.max_lines:
        raise BatchFailedError(
            f"the file has {total} lines that are not blank; expected 1 to {work.max_lines}, which "
            "--max-batch-lines sets"
        )
    return total
