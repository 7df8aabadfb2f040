"""The texts that tasks on a running server write for rows of data."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from clients._async_client import AsyncClient
from clients._calls import Parameters
from clients._errors import EvaluationError, InvalidRequestError, PayloadTooLargeError
from clients._files import Progress

CONCURRENCY = 32
_ROW_REFUSED = (InvalidRequestError, PayloadTooLargeError)


@dataclass(frozen=True, slots=True)
class Output:
    """What a task wrote for one row.

    Attributes:
        text: without the stop string and without white space at the ends; empty when refused.
        finish_reason: as in `clients.Details`; None when refused.
        version: the prefix that was used; None when refused.
        refusal: why the server refused the row; empty when it did not.
    """

    text: str
    finish_reason: str | None = None
    version: str | None = None
    refusal: str = ""


async def generate_outputs(
    client: AsyncClient,
    task_ids: Sequence[str | None],
    sources: Sequence[str],
    parameters: Parameters,
    *,
    concurrency: int = CONCURRENCY,
    progress: Progress | None = None,
) -> tuple[tuple[Output, ...], ...]:
    """What each task writes for each source, in their orders: [tasks][sources].

    A seed among the parameters is for the first row, seed + 1 for the second, and so on, so that
    the draws of different rows are independent, and the same whatever the concurrency.

    Args:
        task_ids: None for the bare base model.
        concurrency: requests under way at once.
        progress: called with the number of texts written, and of all.

    Raises:
        EvaluationError: all rows of a task were refused.
        PrefixServeError: anything else but the refusal of a row; other requests are dropped.
    """
    outputs = [[Output("")] * len(sources) for _ in task_ids]
    # A row's tasks follow each other, so that a task that does not exist is known at once.
    jobs = ((task, row) for row in range(len(sources)) for task in range(len(task_ids)))
    done, total = 0, len(task_ids) * len(sources)

    async def work(jobs: Iterator[tuple[int, int]]) -> None:
        nonlocal done
        for task, row in jobs:
            of_row = parameters.copy()
            if "seed" in of_row:
                of_row["seed"] += row
            outputs[task][row] = await _generate(client, task_ids[task], sources[row], of_row)
            done += 1
            if progress is not None:
                progress(done, total)

    try:
        async with asyncio.TaskGroup() as workers:
            for _ in range(min(concurrency, total)):
                workers.create_task(work(jobs))
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    for task_id, written in zip(task_ids, outputs, strict=True):
        _check_some(task_id, written)
    return tuple(map(tuple, outputs))


async def _generate(
    client: AsyncClient, task_id: str | None, source: str, parameters: Parameters
) -> Output:
    try:
        answer = await client.generate(source, task_id=task_id, **parameters)
    except _ROW_REFUSED as error:
        return Output("", refusal=str(error))
    text, reason = answer.generated_text, answer.details.finish_reason
    if reason == "stop_sequence":
        ends = filter(text.endswith, parameters.get("stop", []))
        text = text.removesuffix(max(ends, key=len, default=""))
    return Output(text.strip(), reason, answer.version)


def _check_some(task_id: str | None, written: Sequence[Output]) -> None:
    if written and all(output.refusal for output in written):
        raise EvaluationError(
            f"the server refused every row for task {task_id!r}; the first: {written[0].refusal}"
        )
