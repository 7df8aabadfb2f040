"""How often a least-recently-used cache has what is asked for."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_HALVINGS = 100


def zipf(tasks: int, exponent: float) -> NDArray[np.float64]:
    """Each task's share of the requests, `[tasks]`, by Zipf's law: 1 / rank^exponent, scaled.

    Args:
        exponent: 0 asks for every task alike; web and word frequencies are near 1.
    """
    weights = np.arange(1, tasks + 1, dtype=np.float64) ** -exponent
    return np.asarray(weights / weights.sum())


def lru_hit_rate(shares: NDArray[np.float64], capacity: int) -> float:
    """Expected share of hits of an LRU cache with room for `capacity` things of one size.

    Che's approximation: a thing is there if it was asked for within the last T requests, where T is
    the same for all and such that `capacity` things are expected there. Che, Tung & Wang 2002,
    "Hierarchical Web caching systems"; why it is so accurate: Fricker, Robert & Roberts 2012, "A
    versatile and accurate approximation for LRU cache performance".

    Args:
        shares: of the requests, independent of each other, by thing; they add to 1.
    """
    if capacity >= len(shares):
        return 1.0
    if capacity <= 0:
        return 0.0
    there = -np.expm1(-shares * _characteristic_time(shares, capacity))
    return float(shares @ there)


def _characteristic_time(shares: NDArray[np.float64], capacity: int) -> float:
    """T, in requests, at which the expected number of things there is `capacity`; by bisection."""
    low, high = 0.0, float(capacity)
    while _expected_there(shares, high) < capacity:
        high *= 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _expected_there(shares, middle) < capacity else (low, middle)
        if math.isclose(low, high, rel_tol=1e-9):
            break
    return high


def _expected_there(shares: NDArray[np.float64], time: float) -> float:
    return float(-np.expm1(-shares * time).sum())
