"""NIST (Doddington 2002) as sums over rows: nltk computes it only for a whole corpus at once.

The information of an n-gram comes from all references, whichever rows a bootstrap draws.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from clients._errors import MissingExtraError

try:
    from nltk.translate.nist_score import nist_length_penalty
    from nltk.util import ngrams
except ModuleNotFoundError as error:
    raise MissingExtraError("evaluation", error.name, "eval") from error

ORDERS = range(1, 6)

Tokens = Sequence[str]


def nist_statistics(
    outputs: Sequence[Tokens], references: Sequence[Sequence[Tokens]]
) -> NDArray[np.float64]:
    """What `nist_score` sums: [rows, 12], for each order of n-gram the information of the n-grams
    that the best reference shares, for each their number in the output, and both lengths.
    """
    information = _information(references)
    rows = [
        _row(output, texts, information) for output, texts in zip(outputs, references, strict=True)
    ]
    return np.array(rows, dtype=np.float64)


def nist_score(sums: NDArray[np.float64]) -> float:
    """The score of a corpus from the sums, [12], of its rows; an order without n-grams counts 0."""
    shared, present, (reference_length, output_length) = np.split(sums, [5, 10])
    precision = np.divide(shared, present, out=np.zeros(5), where=present > 0).sum()
    return float(precision * nist_length_penalty(max(reference_length, 1), output_length))


def _information(references: Sequence[Sequence[Tokens]]) -> dict[tuple[str, ...], float]:
    """Of each n-gram: bits by which its last word is a surprise after the ones before."""
    texts = [text for row in references for text in row]
    counts = Counter(gram for text in texts for n in ORDERS for gram in ngrams(text, n))
    words = sum(map(len, texts))
    return {
        gram: math.log2((counts[gram[:-1]] if gram[:-1] else words) / count)
        for gram, count in counts.items()
    }


def _row(
    output: Tokens, references: Sequence[Tokens], information: dict[tuple[str, ...], float]
) -> list[float]:
    shared, present, lengths = [], [], 0
    for n in ORDERS:
        grams = Counter(ngrams(output, n))
        best = max(
            (_shared_information(grams, reference, n, information), len(reference))
            for reference in references
        )
        shared.append(best[0])
        present.append(float(grams.total()))
        lengths += best[1]
    # The best reference may be another one for each order, so its length is a mean over orders.
    return [*shared, *present, lengths / len(ORDERS), float(len(output))]


def _shared_information(
    grams: Counter[tuple[str, ...]],
    reference: Tokens,
    n: int,
    information: dict[tuple[str, ...], float],
) -> float:
    shared = grams & Counter(ngrams(reference, n))
    return sum(information[gram] * count for gram, count in shared.items())
