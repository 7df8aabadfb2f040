"""Scores of the tasks, and of the base model without them, through a running server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.small_bart.commands import DATA, prefixserve
from clients import AsyncClient
from clients.data import Row, read_rows
from clients.evaluation import Output, generate_outputs, score_outputs

METRICS = ("BLEU", "ROUGE-1", "ROUGE-2", "ROUGE-L")
_NEW_TOKENS = 128
_TIMEOUT_SECONDS = 600.0

Scores = dict[str, dict[str, float]]
"""By metric: `value`, and the ends `low` and `high` of its 95 % interval."""


def score_task(url: str, task: str, data: str, *flags: str) -> tuple[Scores, list[str]]:
    """What `prefixserve eval` says of a task, and the texts that it wrote."""
    chosen = [argument for metric in METRICS for argument in ("--metric", metric)]
    file = DATA / f"{data}-dev.jsonl"
    found = prefixserve("eval", task, "--data", file, "--url", url, *chosen, *flags)
    [result] = found["results"]
    return _scores(result["scores"]), result["outputs"]


def score_base(url: str, data: str) -> tuple[Scores, list[str]]:
    """The same of the base model without a prefix."""
    rows = read_rows(DATA / f"{data}-dev.jsonl")
    outputs = asyncio.run(_written(url, rows))
    result = score_outputs("base", rows, outputs, metrics=METRICS)
    scores = [
        {"name": s.name, "value": s.value, "low": s.low, "high": s.high} for s in result.scores
    ]
    return _scores(scores), [output.text for output in outputs]


async def _written(url: str, rows: Sequence[Row]) -> tuple[Output, ...]:
    async with AsyncClient(url, timeout=_TIMEOUT_SECONDS) as client:
        sources = [row.source for row in rows]
        [outputs] = await generate_outputs(client, [None], sources, {"max_new_tokens": _NEW_TOKENS})
    return outputs


def _scores(found: Iterable[Mapping[str, Any]]) -> Scores:
    return {score["name"]: {key: score[key] for key in ("value", "low", "high")} for score in found}
