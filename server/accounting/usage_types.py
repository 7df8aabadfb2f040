"""What is counted of usage, as values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import date
from enum import StrEnum
from typing import Any, NamedTuple

BASE = ""
"""The bare base model, where tasks are named."""


class Quantity(StrEnum):
    """What is counted."""

    SEQUENCES = "sequences"
    PROMPT_TOKENS = "prompt_tokens"
    PREFIX_TOKENS = "prefix_tokens"
    GENERATED_TOKENS = "generated_tokens"


class Entry(NamedTuple):
    """What a count is of."""

    day: date
    tenant: str
    task_id: str
    quantity: Quantity


@dataclass(frozen=True, slots=True)
class Batch:
    """Counts to add, once: a sender's batches are numbered from 1."""

    sender: str
    number: int
    counts: Mapping[Entry, int]


@dataclass(frozen=True, slots=True)
class UsageRow:
    """What a tenant used of a task on a day (UTC).

    Attributes:
        task_id: None is the bare base model.
        sequences: texts of which at least one token was generated; each input of a call is one.
    """

    day: date
    tenant: str
    task_id: str | None
    sequences: int = 0
    prompt_tokens: int = 0
    prefix_tokens: int = 0
    generated_tokens: int = 0


def rows_of(
    counts: Iterable[tuple[Entry, int]], tenant: str | None, task_id: str | None
) -> list[UsageRow]:
    """The counts of a tenant and a task, or of all, by day, tenant and task."""
    rows: dict[tuple[date, str, str], UsageRow] = {}
    for entry, count in counts:
        if tenant not in (None, entry.tenant) or task_id not in (None, entry.task_id):
            continue
        name = entry[:3]
        row = rows.get(name) or UsageRow(entry.day, entry.tenant, entry.task_id or None)
        figures: dict[str, Any] = {entry.quantity.value: count}
        rows[name] = replace(row, **figures)
    return [rows[name] for name in sorted(rows)]
