"""Intervals and differences: against theory, and against sacrebleu's own bootstrap."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import sacrebleu

from clients.evaluation import Measurement, differences, measure, scores
from clients.evaluation.metrics import Metric, metrics_named

ROWS = 200
MEAN = Metric("mean", "", lambda _, __: np.empty(0), lambda sums: float(sums[0] / sums[1]))


def measured(values: np.ndarray) -> tuple[Measurement, ...]:
    """A mean, measured."""
    return (Measurement(MEAN, np.stack([values, np.ones_like(values)], axis=1)),)


def texts(errors: float, seed: int) -> tuple[list[str], list[list[str]]]:
    """Texts that differ from their references in a share of the words."""
    draw = random.Random(seed)
    references = [[" ".join(draw.choices("abcdefgh", k=12))] for _ in range(ROWS)]
    outputs = [
        " ".join("x" if draw.random() < errors else word for word in row[0].split())
        for row in references
    ]
    return outputs, references


def test_the_interval_of_a_mean_is_the_one_of_theory() -> None:
    values = np.random.default_rng(1).normal(10, 3, ROWS)
    (score,) = scores(measured(values), resamples=4000)
    error = values.std() / math.sqrt(ROWS)
    assert score.value == pytest.approx(values.mean())
    assert (score.low, score.high) == pytest.approx(
        (values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.1 * error
    )


def test_the_interval_of_bleu_is_as_wide_as_sacrebleus() -> None:
    outputs, references = texts(0.2, seed=1)
    (score,) = scores(measure(outputs, references, metrics_named(["BLEU"])))
    theirs = sacrebleu.BLEU().corpus_score(
        outputs, [[row[0] for row in references]], n_bootstrap=1000
    )
    assert score.value == pytest.approx(theirs.score)
    assert score.low is not None
    assert score.high is not None
    assert (score.high - score.low) / 2 == pytest.approx(theirs._ci, rel=0.15)
    assert score.low < theirs.score < score.high


def test_a_seed_decides_which_rows_are_drawn() -> None:
    found = measure(*texts(0.3, seed=2))
    assert scores(found, 50, seed=1) == scores(found, 50, seed=1)
    first, second = (
        [(score.low, score.high) for score in scores(found, 50, seed) if score.value is not None]
        for seed in (1, 2)
    )
    assert all(one != other for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("errors_apart", [0.0, 1.0, 2.0, 4.0])
def test_the_p_value_of_a_paired_difference_is_the_one_of_theory(errors_apart: float) -> None:
    generator = np.random.default_rng(4)
    base = generator.normal(0, 5, ROWS)  # a paired test does not see it
    by = generator.normal(0, 1, ROWS)
    by += errors_apart * by.std() / math.sqrt(ROWS) - by.mean()
    (found,) = differences(measured(base + by), measured(base), resamples=4000)
    assert found.value == pytest.approx(by.mean())
    assert found.low < found.value < found.high
    assert found.p_value == pytest.approx(math.erfc(errors_apart / math.sqrt(2)), abs=0.02)


def test_differences_of_texts() -> None:
    outputs, references = texts(0.2, seed=3)
    worse = [output.replace("a", "y") for output in outputs]
    chosen = metrics_named(["BLEU", "TER"])
    one, other = (measure(written, references, chosen) for written in (outputs, worse))
    for difference, better, bad in zip(
        differences(one, other), scores(one), scores(other), strict=True
    ):
        assert better.value is not None
        assert bad.value is not None
        assert difference.value == pytest.approx(better.value - bad.value)
        assert (difference.value > 0) == better.higher_is_better
        assert difference.p_value < 0.01
    for none in differences(one, one):
        assert (none.value, none.low, none.high, none.p_value) == (0, 0, 0, 1)


def test_what_could_not_be_computed_has_no_difference() -> None:
    missing = (Measurement(MEAN, None, "why"),)
    assert scores(missing)[0].note == "why"
    assert differences(missing, missing) == ()
