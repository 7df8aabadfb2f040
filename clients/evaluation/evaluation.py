"""Evaluation of one task, or of two side by side, on rows of data."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from clients._async_client import AsyncClient
from clients._calls import Parameters
from clients._errors import InvalidArgumentError
from clients._files import Progress
from clients.data import Row, detokenise
from clients.evaluation.generation import CONCURRENCY, Output, generate_outputs
from clients.evaluation.metrics import metrics_named, row_scores
from clients.evaluation.scores import (
    RESAMPLES,
    Difference,
    Measurement,
    Score,
    differences,
    measure,
    scores,
)

MAX_NEW_TOKENS = 128
_TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What a task wrote, and how that scores.

    Attributes:
        outputs: one a row, in the order of the rows. A row that was refused has an empty text,
            which is scored like any other: all tasks are scored on the same rows.
        scores: one a metric.
        row_scores: chrF of each row by itself.
        measured: what `scores` were made of.
    """

    task_id: str
    outputs: tuple[Output, ...]
    scores: tuple[Score, ...]
    row_scores: tuple[float, ...]
    measured: tuple[Measurement, ...] = field(repr=False, compare=False)

    @property
    def versions(self) -> tuple[str, ...]:
        """The prefixes that were used: more than one if the task is split or was replaced."""
        return tuple(sorted({output.version for output in self.outputs if output.version}))

    @property
    def refused(self) -> dict[int, str]:
        """Why the server refused a row, by its number from 1."""
        numbered = enumerate(self.outputs, start=1)
        return {number: output.refusal for number, output in numbered if output.refusal}

    @property
    def cut(self) -> int:
        """How many texts reached max_new_tokens before their end."""
        return sum(output.finish_reason == "length" for output in self.outputs)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A task, and perhaps another to compare with, on the same rows.

    Attributes:
        rows: as they were scored, so with references detokenised if that was asked for.
        model: the server's base model.
        parameters: how the texts were generated.
        results: one a task.
        differences: of the first task from the second, one a metric; empty for one task.
    """

    rows: tuple[Row, ...]
    model: str
    parameters: Parameters
    results: tuple[TaskResult, ...]
    differences: tuple[Difference, ...] = ()


def evaluate(
    task_id: str,
    rows: Sequence[Row],
    *,
    against: str | None = None,
    base_url: str | None = None,
    parameters: Parameters | None = None,
    detokenised: bool = False,
    metrics: Sequence[str] = (),
    concurrency: int = CONCURRENCY,
    resamples: int = RESAMPLES,
    bootstrap_seed: int = 0,
    on_generated: Progress | None = None,
    on_scored: Progress | None = None,
) -> Evaluation:
    """Generate every row with a task on a running server, and score the texts.

    Not for a running event loop: there, await `generate_outputs` and call `score_outputs`.

    Args:
        against: another task to compare with, on the same rows.
        base_url: as in `clients.Client`.
        parameters: how to generate; without any greedily, at most 128 new tokens.
        detokenised: join what a tokeniser split, in references and outputs alike.
        metrics: names of metrics; all without any.
        concurrency: requests under way at once.
        resamples, bootstrap_seed: how many bootstrap samples the intervals are made of, and which.
        on_generated: called with the number of texts written, and of all.
        on_scored: called with the number of metrics computed, and of all.

    Raises:
        InvalidArgumentError: no rows, no such metric, or the two tasks are the same.
        PrefixServeError: the server is not there, has no such task, refuses all rows, or fails.
    """
    metrics_named(metrics)  # a mistake is known before texts are generated
    if not rows or concurrency < 1 or resamples < 1:
        raise InvalidArgumentError("an evaluation needs rows, concurrency and resamples, 1 or more")
    if task_id == against:
        raise InvalidArgumentError(f"task {task_id!r} cannot be compared with itself")
    task_ids = [task_id] if against is None else [task_id, against]
    parameters = {"max_new_tokens": MAX_NEW_TOKENS, **(parameters or {})}

    model, outputs = asyncio.run(
        _generate(base_url, task_ids, rows, parameters, concurrency, on_generated)
    )
    if detokenised:
        rows = [replace(row, references=tuple(map(detokenise, row.references))) for row in rows]
        outputs = [[replace(o, text=detokenise(o.text)) for o in written] for written in outputs]
    results = tuple(
        score_outputs(
            name,
            rows,
            written,
            metrics=metrics,
            resamples=resamples,
            bootstrap_seed=bootstrap_seed,
            progress=on_scored,
        )
        for name, written in zip(task_ids, outputs, strict=True)
    )
    return Evaluation(
        tuple(rows), model, parameters, results, _between(results, resamples, bootstrap_seed)
    )


def score_outputs(
    task_id: str,
    rows: Sequence[Row],
    outputs: Sequence[Output],
    *,
    metrics: Sequence[str] = (),
    resamples: int = RESAMPLES,
    bootstrap_seed: int = 0,
    progress: Progress | None = None,
) -> TaskResult:
    """Score texts, one a row, wherever they come from; arguments as in `evaluate`."""
    texts = [output.text for output in outputs]
    references = [row.references for row in rows]
    measured = measure(texts, references, metrics_named(metrics), progress)
    return TaskResult(
        task_id,
        tuple(outputs),
        scores(measured, resamples, bootstrap_seed),
        row_scores(texts, references),
        measured,
    )


async def _generate(  # noqa: PLR0917 - as in `evaluate`
    base_url: str | None,
    task_ids: Sequence[str],
    rows: Sequence[Row],
    parameters: Parameters,
    concurrency: int,
    progress: Progress | None,
) -> tuple[str, Sequence[Sequence[Output]]]:
    """The server's base model, and what the tasks write: [tasks][rows]."""
    sources = [row.source for row in rows]
    async with AsyncClient(base_url, timeout=_TIMEOUT_SECONDS) as client:
        info = await client.info()
        return info.model_id, await generate_outputs(
            client, task_ids, sources, parameters, concurrency=concurrency, progress=progress
        )


def _between(
    results: Sequence[TaskResult], resamples: int, bootstrap_seed: int
) -> tuple[Difference, ...]:
    if len(results) < 2:
        return ()
    first, second = results
    return differences(first.measured, second.measured, resamples, bootstrap_seed)
