"""Scores of texts, with bootstrap intervals, and how two sets of texts differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from clients._files import Progress
from clients.evaluation.metrics import (
    METRICS,
    Metric,
    MetricDataError,
    References,
    Statistics,
)

RESAMPLES = 1000
_PERCENTILES = (2.5, 97.5)


@dataclass(frozen=True, slots=True)
class Score:
    """What texts reach on one metric.

    Attributes:
        name: of the metric.
        method: whose code computed it and with what settings.
        higher_is_better: false for an error rate.
        value: the score; None if it could not be computed, and then `note` says why.
        low, high: 95 % percentile bootstrap interval over rows, None with `value`.
    """

    name: str
    method: str
    higher_is_better: bool
    value: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Difference:
    """How much one set of texts scores over another on one metric.

    Attributes:
        name: of the metric.
        value: score minus the other's score.
        low, high: 95 % percentile interval of a paired bootstrap over rows.
        p_value: of the hypothesis that there is no difference, by the same bootstrap, two-sided.
    """

    name: str
    value: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True, slots=True)
class Measurement:
    """One metric on a set of texts, row by row; `statistics` is None where `note` says why."""

    metric: Metric
    statistics: Statistics | None
    note: str = ""


def measure(
    outputs: Sequence[str],
    references: References,
    metrics: Sequence[Metric] = METRICS,
    progress: Progress | None = None,
) -> tuple[Measurement, ...]:
    """Compute the metrics on texts and their references, which have the same order.

    Args:
        progress: called with the number of metrics computed, and of all.
    """
    measured: list[Measurement] = []
    for metric in metrics:
        if progress is not None:
            progress(len(measured), len(metrics))
        try:
            measured.append(Measurement(metric, metric.statistics(outputs, references)))
        except MetricDataError as error:
            measured.append(Measurement(metric, None, str(error)))
    return tuple(measured)


def scores(
    measured: Sequence[Measurement], resamples: int = RESAMPLES, seed: int = 0
) -> tuple[Score, ...]:
    """The score of each measurement with its interval; `seed` decides which rows are drawn."""
    return tuple(_score(measurement, resamples, seed) for measurement in measured)


def differences(
    measured: Sequence[Measurement],
    others: Sequence[Measurement],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[Difference, ...]:
    """How `measured` differs from `others`, the same metrics on other texts for the same rows.

    Metrics that could not be computed are left out.
    """
    return tuple(
        _difference(one.metric, one.statistics, other.statistics, resamples, seed)
        for one, other in zip(measured, others, strict=True)
        if one.statistics is not None and other.statistics is not None
    )


def _score(measurement: Measurement, resamples: int, seed: int) -> Score:
    metric, statistics = measurement.metric, measurement.statistics
    score = Score(metric.name, metric.method, metric.higher_is_better, note=measurement.note)
    if statistics is None:
        return score
    low, high = _interval(_bootstrap(metric, statistics, resamples, seed))
    return replace(score, value=metric.score(statistics.sum(axis=0)), low=low, high=high)


def _difference(
    metric: Metric, one: Statistics, other: Statistics, resamples: int, seed: int
) -> Difference:
    value = metric.score(one.sum(axis=0)) - metric.score(other.sum(axis=0))
    drawn = _bootstrap(metric, one, resamples, seed) - _bootstrap(metric, other, resamples, seed)
    low, high = _interval(drawn)
    # Without a difference the draws would lie as they do, but around 0 (Efron & Tibshirani, 16.4);
    # adding 1 keeps a p-value of few draws from being 0.
    as_far = np.count_nonzero(np.abs(drawn - value) >= abs(value))
    return Difference(metric.name, value, low, high, float((as_far + 1) / (resamples + 1)))


def _bootstrap(
    metric: Metric, statistics: Statistics, resamples: int, seed: int
) -> NDArray[np.float64]:
    """Scores of as many rows drawn with replacement, [resamples].

    The same seed draws the same rows for every metric and for every set of as many texts.
    """
    rows = len(statistics)
    generator = np.random.default_rng(seed)
    draws = (generator.integers(rows, size=rows) for _ in range(resamples))
    return np.array([metric.score(statistics[drawn].sum(axis=0)) for drawn in draws])


def _interval(drawn: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(drawn, _PERCENTILES)
    return float(low), float(high)
