"""How long steps take, learnt from those that ran."""

from __future__ import annotations

import math

import numpy as np

_HALF_LIFE_STEPS = 50
_ENOUGH_STEPS = 8
_RIDGE = 1e-9


class StepCost:
    """A step's seconds as a sum: for any step, for each decoding row, for each prompt token.

    Least squares over the steps that ran, in which a step counts half as much as one 50 steps
    later. So it follows the machine, the model and what is asked of them: where a step is bound by
    reading the weights, as on a GPU, prompt tokens turn out to cost nothing up to some number.
    """

    def __init__(self) -> None:
        self._moments = np.zeros((3, 3))
        self._sums = np.zeros(3)
        self._steps = 0
        self._fade = 0.5 ** (1 / _HALF_LIFE_STEPS)

    def observe(self, decoding: int, prompt_tokens: int, seconds: float) -> None:
        """Learn from a step that took so long."""
        step = np.array([1.0, decoding, prompt_tokens])
        self._moments = self._fade * self._moments + np.outer(step, step)
        self._sums = self._fade * self._sums + seconds * step
        self._steps += 1

    def prompt_tokens(self, decoding: int, lengthening: float) -> float:
        """So many make a step of so many decoding rows longer by that share of it.

        Infinite where they cost nothing, or too few steps ran to tell.
        """
        if self._steps < _ENOUGH_STEPS:
            return math.inf
        # Without the ridge, steps that are all alike would have no solution.
        ridge = _RIDGE * np.trace(self._moments) * np.eye(3)
        step, row, token = np.linalg.solve(self._moments + ridge, self._sums)
        seconds = max(0.0, float(step + row * decoding))
        return math.inf if token <= 0 else lengthening * seconds / float(token)
