"""Which of a row's references to train on."""

from __future__ import annotations

from collections.abc import Sequence

from clients._errors import MissingExtraError
from clients.data import Row


def typical_rows(rows: Sequence[Row], count: int) -> tuple[Row, ...]:
    """The rows with at most `count` references each: those most like the row's others.

    People write the same facts in many ways, some of them odd or wrong; greedy decoding writes best
    when the model has learnt the ways on which they agree. Likeness is sacrebleu's sentence BLEU
    against the row's other references; of equal ones the first are kept.

    Raises:
        MissingExtraError: sacrebleu is not installed.
    """
    return tuple(
        row if len(row.references) <= count else Row(row.source, _typical(row.references, count))
        for row in rows
    )


def _typical(references: tuple[str, ...], count: int) -> tuple[str, ...]:
    try:
        from sacrebleu import BLEU  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise MissingExtraError("choosing references", error.name, "train") from error
    bleu = BLEU(effective_order=True)
    likeness = [
        bleu.sentence_score(text, [*references[:i], *references[i + 1 :]]).score
        for i, text in enumerate(references)
    ]
    best = sorted(range(len(references)), key=lambda i: -likeness[i])[:count]
    return tuple(references[i] for i in sorted(best))
