"""The HTML report: whole, harmless whatever texts say, and with the rows that matter."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from clients import EvaluationError
from clients.data import Row
from clients.evaluation import Evaluation, Output, differences, score_outputs, write_report
from clients.evaluation.report import sections

EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)> &amp; \"' {{ 7*7 }}"
VOID = {"meta", "br", "img", "link"}


class Page(HTMLParser):
    """A page's tags, attributes and text; fails on a tag that is not closed in its place."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def evaluation(*texts_of_tasks: list[str], references: list[str], names: str = "ab") -> Evaluation:
    """Tasks that wrote these texts."""
    rows = tuple(Row(f"source {text}", (text, "other")) for text in references)
    results = tuple(
        score_outputs(name, rows, [Output(text, "eos_token", "sha256:1") for text in texts])
        for name, texts in zip(names, texts_of_tasks, strict=False)
    )
    between = differences(*(r.measured for r in results)) if len(results) == 2 else ()
    return Evaluation(rows, "model", {"max_new_tokens": 9}, results, between)


def written(evaluation: Evaluation, folder: Path, data_name: str = "dev.jsonl") -> str:
    """The report, with an empty data file."""
    data = folder / data_name
    data.touch()
    write_report(folder / "report.html", evaluation, data)
    return (folder / "report.html").read_text(encoding="utf-8")


def test_whatever_texts_say_is_only_text(tmp_path: Path) -> None:
    found = evaluation([EVIL, "x"], ["y", EVIL], references=[EVIL, "z"], names=[EVIL, "<b>"])  # type: ignore[arg-type]
    refused = Output("", refusal=EVIL)
    rows = found.rows
    results = (score_outputs(EVIL, rows, [refused, found.results[0].outputs[1]]), found.results[1])
    found = Evaluation(rows, EVIL, {"stop": [EVIL]}, results, found.differences)
    html = written(found, tmp_path, "<i>.jsonl")
    page = Page(html)
    assert {"script", "img", "b", "i", "link"} & set(page.tags) == {"b", "i"}  # of the axis
    assert "<i>.jsonl" not in html
    assert "<b></b>" not in html
    for text in (EVIL, f"source {EVIL}", f"refused: {EVIL}", "<i>.jsonl"):
        assert text in page.texts
    assert not any(name.startswith("on") or name in {"src", "href"} for name, _ in page.attributes)
    assert not re.search(r"https?://|url\(|@import", html)


def test_scores_intervals_and_differences_are_in_it(tmp_path: Path) -> None:
    texts = ["the cat sat", "a dog ran by", "no", "birds sing here"]
    found = evaluation(texts, texts[::-1], references=texts)
    page = Page(written(found, tmp_path))
    for result in found.results:
        for score in result.scores:
            if score.value is None:
                assert score.note in page.texts
            else:
                assert f"{score.value:.2f}" in page.texts
                assert f"{score.low:.2f} to {score.high:.2f}" in page.texts
    for difference in found.differences:
        assert f"{difference.value:+.2f}" in page.texts
        assert f"{difference.low:.2f} to {difference.high:.2f}" in page.texts
    widths = [value for name, value in page.attributes if name == "style" and value]
    percents = [float(number) for style in widths for number in re.findall(r"([\d.]+)%", style)]
    assert percents
    assert all(0 <= percent <= 100 for percent in percents)


def test_the_rows_that_are_shown() -> None:
    references = [f"the number {'abcdefgh'[i]} of eight words" for i in range(8)]
    first = [text[: 8 + 2 * i] for i, text in enumerate(references)]
    second = [*first[:4], references[4], "", *first[6:]]
    found = evaluation(first, second, references=references)
    shown = {section.heading: section.rows for section in sections(found, size=3)}
    assert shown["Worst rows of a"] == (0, 1, 2)
    assert shown["Best rows of a"] == (7, 6, 5)
    assert shown["Where a is furthest ahead"] == (5,)
    assert shown["Where b is furthest ahead"] == (4,)
    assert len(set(shown["Random rows"])) == 3
    alone = sections(evaluation(first, references=references), size=100)
    assert [section.heading for section in alone] == [
        "Worst rows of a",
        "Best rows of a",
        "Random rows",
    ]
    assert all(sorted(section.rows) == list(range(8)) for section in alone)


def test_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"cannot be written to .*: Is a directory"):
        write_report(tmp_path, evaluation(["a"], references=["a"]), Path(__file__))
