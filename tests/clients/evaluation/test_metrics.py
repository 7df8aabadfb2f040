"""Metrics: cases that can be worked out by hand, and the libraries themselves."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import nltk
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.nist_score import corpus_nist

from clients import InvalidArgumentError
from clients.evaluation import measure, metric_names, scores
from clients.evaluation.metrics import METRICS, References, metrics_named, row_scores

BY_NAME = {metric.name: metric for metric in METRICS}


def score(name: str, outputs: list[str], references: References) -> float:
    metric = BY_NAME[name]
    return metric.score(metric.statistics(outputs, references).sum(axis=0))


@pytest.mark.parametrize(
    ("name", "output", "references", "expected"),
    [
        # Every n-gram is there, and the text is one word of five short.
        ("BLEU", "a b c d", ["a b c d e"], 100 * math.exp(1 - 5 / 4)),
        ("BLEU", "a b c d", ["x y", "a b c d"], 100),
        # One word to change; the length is the references' mean.
        ("TER", "a b x d", ["a b c d"], 100 / 4),
        ("TER", "a b x d", ["a b c d", "a b x d e f"], 100 / 5),
        # Precision 1; recall 2 words of 3, 1 pair of 2.
        ("ROUGE-1", "the cat", ["the cat sat"], 100 * 2 * (2 / 3) / (1 + 2 / 3)),
        ("ROUGE-2", "the cat", ["the cat sat"], 100 * 2 * (1 / 2) / (1 + 1 / 2)),
        ("ROUGE-L", "the sat cat", ["the cat sat"], 100 * 2 / 3),
        ("ROUGE-L", "the sat cat", ["dog", "the sat cat", "cat"], 100),
        ("chrF", "a b c d", ["x", "a b c d"], 100),
        ("chrF", "a b c d", ["xyz"], 0),
        # Both words are one of two, 1 bit each; "b" after "a" is no surprise.
        ("NIST", "a b", ["a b"], 1),
        ("NIST", "c", ["a b"], 0),
        # 2 words of 3 halve it.
        ("NIST", "a b", ["a b c"], 0.5 * math.log2(3)),
    ],
)
def test_by_hand(name: str, output: str, references: list[str], expected: float) -> None:
    assert score(name, [output], [references]) == pytest.approx(expected)


def test_rows_may_have_different_numbers_of_references() -> None:
    outputs = ["the cat", "dog"]
    references = [["the cat sat"], ["cat", "dog", "bird"]]
    assert score("ROUGE-1", outputs, references) == pytest.approx((80 + 100) / 2)
    columns = [["the cat sat", "cat"], [None, "dog"], [None, "bird"]]
    for name, metric in (
        ("BLEU", sacrebleu.BLEU()),
        ("chrF", sacrebleu.CHRF()),
        ("TER", sacrebleu.TER()),
    ):
        expected = metric.corpus_score(outputs, columns).score  # type: ignore[arg-type]
        assert score(name, outputs, references) == pytest.approx(expected)


@pytest.mark.parametrize("name", [name for name in BY_NAME if name != "METEOR"])
def test_an_empty_text_is_scored_like_any_other(name: str) -> None:
    worst = 0 if BY_NAME[name].higher_is_better else 100
    assert score(name, [""], [["a b"]]) == pytest.approx(worst)


WORDS = st.lists(st.sampled_from("abcd"), min_size=1, max_size=9)
ROWS = st.lists(st.tuples(WORDS, st.lists(WORDS, min_size=1, max_size=3)), max_size=4)


@given(rows=ROWS)
@settings(deadline=None)
def test_nist_is_what_nltk_computes(rows: list[tuple[list[str], list[list[str]]]]) -> None:
    rows = [(list("abcde"), [list("abc")]), *rows]  # nltk divides by the number of 5-grams
    outputs, references = ([row[i] for row in rows] for i in (0, 1))
    ours = score(
        "NIST",
        [" ".join(output) for output in outputs],
        [[" ".join(text) for text in texts] for texts in references],
    )
    assert ours == pytest.approx(corpus_nist(references, outputs))


def test_rows_are_put_in_order_by_chrf() -> None:
    outputs, references = ["a b c", "a b x", "x"], [["a b c"]] * 3
    best, middle, worst = row_scores(outputs, references)
    assert (best, worst) == (pytest.approx(100), 0)
    assert middle == pytest.approx(score("chrF", ["a b x"], [["a b c"]]))


def test_metrics_are_chosen_by_name() -> None:
    assert [metric.name for metric in metrics_named(["rouge-l", "BLEU"])] == ["BLEU", "ROUGE-L"]
    assert tuple(metric.name for metric in metrics_named([])) == metric_names()
    with pytest.raises(InvalidArgumentError, match=r"no metric 'BLUE'; there are BLEU, chrF,"):
        metrics_named(["BLUE"])


def test_without_its_data_meteor_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.data, "path", [])
    (score,) = scores(measure(["a"], [["a"]], metrics_named(["METEOR"])))
    assert (score.value, score.low, score.high) == (None, None, None)
    assert score.note == "needs WordNet: python -m nltk.downloader wordnet"


def test_with_broken_data_meteor_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "corpora" / "wordnet").mkdir(parents=True)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    (score,) = scores(measure(["a"], [["a"]], metrics_named(["METEOR"])))
    assert score.value is None
    assert score.note.startswith("WordNet cannot be read: ")


SYNSET = "00000000 00 n 02 food 0 meal 0 000 | what is eaten  \n"
METEOR = """
import json, sys
from clients.evaluation.metrics import metrics_named
metric, = metrics_named(["METEOR"])
rows = json.load(sys.stdin)
print(metric.score(metric.statistics(*rows).sum(axis=0)))
"""


def test_meteor_with_its_data(tmp_path: Path) -> None:
    """A WordNet of two words for one thing. In a process of its own: nltk keeps what it loaded."""
    folder = tmp_path / "corpora" / "wordnet"
    folder.mkdir(parents=True)
    for word in ("adj", "adv", "noun", "verb"):
        for name in (f"index.{word}", f"data.{word}", f"{word}.exc"):
            (folder / name).touch()
    (folder / "index.sense").touch()
    (folder / "lexnames").write_text("00\tnoun.artifact\t1\n")
    (folder / "data.noun").write_text(SYNSET)
    (folder / "index.noun").write_text(
        "".join(f"{word} n 1 0 1 0 00000000  \n" for word in ("food", "meal"))
    )
    found = subprocess.run(
        [sys.executable, "-c", METEOR],
        input=json.dumps([["one nice meal", "no"], [["x", "one nice food"], ["yes"]]]),
        env={**os.environ, "NLTK_DATA": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    # Three words match in one chunk, and of the second row none.
    assert float(found.stdout) == pytest.approx(100 * (1 - 0.5 * (1 / 3) ** 3) / 2)
