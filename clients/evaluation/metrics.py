"""What texts are scored by: metrics of well-known libraries, each as sums over rows.

A metric turns each row into a few numbers, and sums of these into its score. A bootstrap only has
to add up other rows, and every metric gets its interval in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clients._errors import InvalidArgumentError, MissingExtraError
from clients.evaluation.nist import nist_score, nist_statistics

try:
    import sacrebleu
    from nltk.corpus import wordnet
    from nltk.translate.meteor_score import meteor_score
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
except ModuleNotFoundError as error:
    raise MissingExtraError("evaluation", error.name, "eval") from error

References = Sequence[Sequence[str]]
"""The texts that people wrote for each row; rows may have different numbers of them."""
Statistics = NDArray[np.float64]
"""[rows, k]: k numbers of each row, whose sums over rows give a score."""


class MetricDataError(Exception):
    """A metric needs data that is not on this machine; the text says which and how to get it."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One way to score texts.

    Attributes:
        name: as the field writes it.
        method: whose code computes it and with what settings.
        statistics: `Statistics` of outputs and their references; may raise `MetricDataError`.
        score: the score that sums of statistics, [k], make.
        higher_is_better: false for an error rate.
    """

    name: str
    method: str
    statistics: Callable[[Sequence[str], References], Statistics]
    score: Callable[[Statistics], float]
    higher_is_better: bool = True


def metric_names() -> tuple[str, ...]:
    """The names of all metrics, in the order in which they are shown."""
    return tuple(metric.name for metric in METRICS)


def metrics_named(names: Sequence[str]) -> tuple[Metric, ...]:
    """The metrics of these names, in whatever case; all of them when there are no names.

    Raises:
        InvalidArgumentError: there is no metric of a name.
    """
    wanted = {name.casefold() for name in names}
    for name in names:
        if name.casefold() not in map(str.casefold, metric_names()):
            known = ", ".join(metric_names())
            raise InvalidArgumentError(f"there is no metric {name!r}; there are {known}")
    return tuple(metric for metric in METRICS if not wanted or metric.name.casefold() in wanted)


def row_scores(outputs: Sequence[str], references: References) -> tuple[float, ...]:
    """chrF of each row by itself, 0 to 100: what rows are put in order by, good to bad."""
    metric = sacrebleu.CHRF()
    pairs = zip(outputs, references, strict=True)
    return tuple(metric.sentence_score(output, texts).score for output, texts in pairs)


def _from_sacrebleu(metric: Any, name: str, settings: str, *, higher_is_better: bool) -> Metric:
    # sacrebleu's own bootstrap uses these two methods, whose names begin with an underscore.
    return Metric(
        name,
        f"sacrebleu {metadata.version('sacrebleu')}, {settings}",
        lambda outputs, references: np.array(
            metric._extract_corpus_statistics(outputs, _columns(references)), dtype=np.float64
        ),
        lambda sums: float(metric._compute_score_from_stats(sums).score),
        higher_is_better,
    )


def _columns(references: References) -> list[list[str | None]]:
    """First references of all rows, second references, and so on; None where a row has fewer."""
    most = max(map(len, references))
    return [[row[i] if i < len(row) else None for row in references] for i in range(most)]


def _rouge(kind: str, name: str) -> Metric:
    scorer = RougeScorer([kind])

    def row_score(output: str, references: Sequence[str]) -> float:
        return float(scorer.score_multi(references, output)[kind].fmeasure)

    version = metadata.version("rouge-score")
    return _mean(name, f"rouge-score {version}, F1, no stemming, best reference", row_score)


def _mean(name: str, method: str, row_score: Callable[[str, Sequence[str]], float]) -> Metric:
    """The mean, in percent, of a score from 0 to 1 that every row has by itself."""

    def statistics(outputs: Sequence[str], references: References) -> Statistics:
        pairs = zip(outputs, references, strict=True)
        return np.array([(row_score(output, texts), 1.0) for output, texts in pairs])

    return Metric(name, method, statistics, lambda sums: float(100 * sums[0] / sums[1]))


def _tokens(text: str) -> list[str]:
    return str(_TOKENIZER(text)).split()


def _meteor_row(output: str, references: Sequence[str]) -> float:
    try:
        wordnet.ensure_loaded()
    except LookupError as error:
        raise MetricDataError("needs WordNet: python -m nltk.downloader wordnet") from error
    except Exception as error:  # nltk checks files as it reads them, with errors of every kind
        raise MetricDataError(f"WordNet cannot be read: {error}") from error
    return float(meteor_score([_tokens(text) for text in references], _tokens(output)))


def _nist(outputs: Sequence[str], references: References) -> Statistics:
    tokens = [[_tokens(text) for text in texts] for texts in references]
    return nist_statistics([_tokens(output) for output in outputs], tokens)


_TOKENIZER = Tokenizer13a()  # type: ignore[no-untyped-call]
_NLTK = f"nltk {metadata.version('nltk')}"

METRICS = (
    _from_sacrebleu(
        sacrebleu.BLEU(force=True), "BLEU", "13a tokens, mixed case", higher_is_better=True
    ),
    _from_sacrebleu(sacrebleu.CHRF(), "chrF", "chrF2, mixed case", higher_is_better=True),
    _from_sacrebleu(sacrebleu.TER(), "TER", "tercom tokens, lower case", higher_is_better=False),
    _rouge("rouge1", "ROUGE-1"),
    _rouge("rouge2", "ROUGE-2"),
    _rouge("rougeL", "ROUGE-L"),
    _mean("METEOR", f"{_NLTK}, 13a tokens, lower case, best reference", _meteor_row),
    Metric("NIST", f"{_NLTK}, 13a tokens, mixed case, 5-grams", _nist, nist_score),
)
