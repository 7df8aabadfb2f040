"""One batch on its way: each line that is not done is answered, and its result appended."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

from prefix_store.errors import StoreUnavailableError
from server.batches.input_file import numbered_lines
from server.batches.records import BatchRecord, Counts, now
from server.batches.result_file import ResultFile, result_id
from server.batches.store import BatchStore
from server.callers import Caller
from server.request_context import RequestContext, answering

_OK = 200
_LONGEST_WAIT_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class LineAnswer:
    """What a line of a batch is answered with.

    Attributes:
        custom_id: the client's name for it; None where the line does not tell.
        status: as if it were a request of its own; None where it is none.
        body: the JSON of the answer, or `code` and `message` of what is wrong with the line.
        retry_after: seconds after which it may be answered; None where this is the answer.
    """

    custom_id: str | None
    status: int | None
    body: dict[str, Any]
    retry_after: float | None = None


AnswerLine = Callable[[Caller, str, bytes], Awaitable[LineAnswer]]
"""Answers a line of a batch by its caller and endpoint; it raises nothing."""

IsActive = Callable[[str], Awaitable[bool]]
"""Whether an API key is good, by its id; raises StoreUnavailableError."""


class BatchFailedError(Exception):
    """The batch cannot go on; the text is for its owner."""


@dataclass(frozen=True, slots=True)
class Work:
    """What every batch's run needs.

    Attributes:
        answer: see `AnswerLine`.
        is_active: see `IsActive`.
        places: held while a line is answered, so that all batches together are bounded.
        workers: lines of one batch under way at once.
        max_lines, max_line_bytes: a file with more fails; a longer line gets an error.
    """

    store: BatchStore
    answer: AnswerLine
    is_active: IsActive
    places: asyncio.Semaphore
    workers: int
    max_lines: int
    max_line_bytes: int


class BatchRun:
    """Runs a batch's lines. It holds the files of results open until it is closed."""

    def __init__(self, work: Work, batch: BatchRecord, total: int) -> None:
        """
        Args:
            total: its lines.

        Raises:
            OSError, ValueError: a file of results cannot be opened, or is damaged.
        """
        self._work = work
        self._batch = batch
        self._total = total
        self._output = ResultFile(work.store.path(batch.output_id))
        try:
            self._errors = ResultFile(work.store.path(batch.error_id))
        except BaseException:
            self._output.close()
            raise

    @property
    def counts(self) -> Counts:
        """What is done until now."""
        return Counts(
            total=self._total,
            completed=len(self._output.done),
            failed=len(self._errors.done),
        )

    def close(self) -> None:
        """Bring the results to the disk.

        Raises:
            OSError: that fails.
        """
        try:
            self._output.close()
        finally:
            self._errors.close()

    async def run(self) -> None:
        """Answer every line that has no result yet; on an error or a cancellation, stop.

        Raises:
            TimeoutError: the batch's time is over.
            BatchFailedError: its key is no longer good.
            OSError: a file cannot be read or written.
        """
        lines = self._undone()
        try:
            async with (
                asyncio.timeout(self._batch.expires_at - now()),
                asyncio.TaskGroup() as workers,
            ):
                for _ in range(self._work.workers):
                    workers.create_task(self._take(lines))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    def _undone(self) -> Iterator[tuple[int, bytes | None]]:
        path = self._work.store.path(self._batch.input_id)
        for number, line in numbered_lines(path, self._work.max_line_bytes):
            if number not in self._output.done and number not in self._errors.done:
                yield number, line

    async def _take(self, lines: Iterator[tuple[int, bytes | None]]) -> None:
        for number, line in lines:
            request_id = secrets.token_hex(16)
            with answering(RequestContext(request_id)):
                answer = await self._answer(line)
            to = self._output if answer.status == _OK else self._errors
            name = result_id(self._batch.id, number)
            await to.append(number, _result(name, request_id, answer))

    async def _answer(self, line: bytes | None) -> LineAnswer:
        """The answer to a line, however long it takes until limits and the queue allow it."""
        if line is None:
            most = self._work.max_line_bytes
            message = f"the line has over {most} bytes, which --max-body-bytes sets"
            return LineAnswer(None, None, {"code": "line_too_long", "message": message})
        while True:
            await self._check_key()
            async with self._work.places:
                answer = await self._work.answer(self._batch.caller, self._batch.endpoint, line)
            if answer.retry_after is None:
                return answer
            await asyncio.sleep(min(answer.retry_after, _LONGEST_WAIT_SECONDS))

    async def _check_key(self) -> None:
        key_id = self._batch.key_id
        try:
            if key_id is not None and not await self._work.is_active(key_id):
                raise BatchFailedError(
                    f"the API key {key_id}, which the batch was created with, is no longer good; "
                    "create the batch again with another"
                )
        except StoreUnavailableError:
            return  # the line finds out, and waits


def _result(name: str, request_id: str, answer: LineAnswer) -> str:
    """A line of the output or of the error file, as OpenAI has it."""
    response = {"status_code": answer.status, "request_id": request_id, "body": answer.body}
    is_request = answer.status is not None
    return json.dumps(
        {
            "id": name,
            "custom_id": answer.custom_id,
            "response": response if is_request else None,
            "error": None if is_request else answer.body,
        }
    )
