"""The scores of an evaluation for a terminal and for programs."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from clients.evaluation.evaluation import Evaluation, TaskResult
from clients.evaluation.scores import Score


def score_table(evaluation: Evaluation) -> Table:
    """A line for each metric; with two tasks, their difference and its p-value too."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("METRIC", no_wrap=True)
    for result in evaluation.results:
        table.add_column(Text(result.task_id), justify="right")
        table.add_column("95 %")
    if evaluation.differences:
        table.add_column("DIFFERENCE", justify="right")
        table.add_column("95 %", no_wrap=True)
        table.add_column("P", justify="right", no_wrap=True)
    differences = {difference.name: difference for difference in evaluation.differences}
    for of_tasks in zip(*(result.scores for result in evaluation.results), strict=True):
        cells = [cell for score in of_tasks for cell in _cells(score)]
        if (difference := differences.get(of_tasks[0].name)) is not None:
            cells += [f"{difference.value:+.2f}", interval(difference.low, difference.high)]
            cells += [p_value(difference.p_value)]
        table.add_row(name_with_arrow(of_tasks[0]), *cells)
    return table


def name_with_arrow(score: Score) -> str:
    """A metric's name, and which way is better."""
    return f"{score.name} {'↑' if score.higher_is_better else '↓'}"


def interval(low: float, high: float) -> str:
    """Both ends of an interval."""
    return f"{low:.2f} to {high:.2f}"


def p_value(value: float) -> str:
    """A p-value as people write it."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def to_fields(evaluation: Evaluation) -> dict[str, Any]:
    """What JSON says of an evaluation."""
    return {
        "model": evaluation.model,
        "rows": len(evaluation.rows),
        "parameters": evaluation.parameters,
        "results": [_result_fields(result) for result in evaluation.results],
        "differences": evaluation.differences,
    }


def _cells(score: Score) -> tuple[str | Text, str | Text]:
    if score.value is None or score.low is None or score.high is None:
        return "-", Text(score.note, style="dim")
    return f"{score.value:.2f}", interval(score.low, score.high)


def _result_fields(result: TaskResult) -> dict[str, Any]:
    return {
        "task_id": result.task_id,
        "versions": result.versions,
        "scores": result.scores,
        "refused": result.refused,
        "cut": result.cut,
        "outputs": [output.text for output in result.outputs],
    }
