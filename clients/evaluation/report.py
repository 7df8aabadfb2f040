"""An evaluation as one HTML file that needs nothing else: scores, and rows side by side."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from clients._errors import EvaluationError, MissingExtraError
from clients.data import sha256_of
from clients.evaluation.evaluation import Evaluation
from clients.evaluation.table import interval, name_with_arrow, p_value

try:
    from jinja2 import Environment, PackageLoader, StrictUndefined
except ModuleNotFoundError as error:
    raise MissingExtraError("evaluation", error.name, "eval") from error

ROWS_PER_SECTION = 10


@dataclass(frozen=True, slots=True)
class Section:
    """Some of the rows, under a heading.

    Attributes:
        rows: their indices, from 0.
    """

    heading: str
    rows: tuple[int, ...]


def write_report(path: Path, evaluation: Evaluation, data: Path) -> None:
    """Write the report; everything that people or models wrote is escaped in it.

    Args:
        data: the file that the rows were read from.

    Raises:
        DataError: the data file is gone.
        EvaluationError: the report cannot be written.
    """
    page = render(evaluation, data.name, sha256_of(data))
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise EvaluationError(
            f"the report cannot be written to {path}: {error.strerror}"
        ) from error


def render(evaluation: Evaluation, data_name: str, data_sha256: str) -> str:
    """The report as HTML."""
    environment = Environment(
        loader=PackageLoader("clients.evaluation", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(name_with_arrow=name_with_arrow, p_value=p_value)
    return environment.get_template("report.html").render(
        evaluation=evaluation,
        data_name=data_name,
        data_sha256=data_sha256,
        sections=sections(evaluation),
        interval=interval,
        scale=_scale(evaluation),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def sections(evaluation: Evaluation, size: int = ROWS_PER_SECTION) -> tuple[Section, ...]:
    """The rows to show: with two tasks where they differ most, the worst, the best, random ones.

    Worst and best go by the first task's chrF of each row.
    """
    indices = range(len(evaluation.rows))
    first = evaluation.results[0]
    chosen = [
        Section(
            f"Worst rows of {first.task_id}", _top(indices, lambda i: -first.row_scores[i], size)
        ),
        Section(
            f"Best rows of {first.task_id}", _top(indices, lambda i: first.row_scores[i], size)
        ),
        Section("Random rows", _random(indices, size)),
    ]
    if len(evaluation.results) == 2:
        chosen = [*_ahead(evaluation, size), *chosen]
    return tuple(section for section in chosen if section.rows)


def _ahead(evaluation: Evaluation, size: int) -> list[Section]:
    """Where either task is furthest ahead of the other."""
    found = []
    first, second = evaluation.results
    for one, other in ((first, second), (second, first)):
        lead = [a - b for a, b in zip(one.row_scores, other.row_scores, strict=True)]
        ahead = [index for index, by in enumerate(lead) if by > 0]
        found.append(
            Section(f"Where {one.task_id} is furthest ahead", _top(ahead, lead.__getitem__, size))
        )
    return found


def _top(indices: Sequence[int], key: Callable[[int], float], size: int) -> tuple[int, ...]:
    return tuple(sorted(indices, key=key, reverse=True)[:size])


def _random(indices: Sequence[int], size: int) -> tuple[int, ...]:
    """The same rows for every report on as many rows."""
    return tuple(random.Random(0).sample(indices, min(size, len(indices))))  # noqa: S311


def _scale(evaluation: Evaluation) -> dict[str, float]:
    """Of each metric the score at the right end of its axis: 100, or more if an interval is there;
    NIST has no upper bound.
    """
    scale: dict[str, float] = {}
    for result in evaluation.results:
        for score in result.scores:
            least = 100.0 if score.name != "NIST" else 10.0
            scale[score.name] = max(scale.get(score.name, least), score.high or 0.0)
    return scale
