"""The quality report says what its results say, and no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.quality.plan import METHODS, ROW_COUNTS, SEEDS, plan
from benchmarks.quality.report import write_report


def result(bleu: float, *, parts: tuple[str, ...] = ("dev",), parameters: int = 1000) -> Any:
    score = {"value": bleu, "low": bleu - 1, "high": bleu + 1}
    return {
        "scores": {part: {"BLEU": score, "ROUGE-L": score} for part in parts},
        "parameters": parameters,
        "steps": 7,
        "dev_loss": 1.25,
        "seconds": 90.0,
        "date": "2026-01-02 03:04 UTC",
        "machine": {"cpu": "a processor", "cores": 2, "torch": "2"},
    }


def report(results: dict[str, Any], tmp_path: Path) -> str:
    write_report(results, tmp_path)
    return (tmp_path / "quality.md").read_text()


def test_runs_have_names_of_their_own_and_start_from_earlier_ones() -> None:
    names = [run.name for run in plan()]
    assert len(set(names)) == len(names)
    for number, run in enumerate(plan()):
        assert run.start is None or run.start in names[:number]


def test_a_report_without_results_says_that_nothing_was_run(tmp_path: Path) -> None:
    text = report({}, tmp_path)
    assert text.count("not run") >= len(METHODS) + 2 * len(ROW_COUNTS)
    assert "it holds" not in text


def unseen(prefix: float, finetune: float, seen: float = 40.0) -> dict[str, Any]:
    found = {"prefix": result(prefix, parts=("seen", "unseen")), "finetune": result(finetune)}
    found["finetune"]["scores"] = {
        "seen": result(seen)["scores"]["dev"],
        "unseen": result(finetune)["scores"]["dev"],
    }
    return {f"extrapolation-{method}": one for method, one in found.items()}


def test_a_small_difference_is_not_called_a_finding(tmp_path: Path) -> None:
    text = report(unseen(30.1, 30.0), tmp_path)
    assert "it holds in part; there it is as good (+0.1 BLEU)" in text
    assert "it does not hold" in report(unseen(30.1, 30.0, seen=20.0), tmp_path)
    assert "it holds; there it is 2.0 BLEU ahead" in report(unseen(32.0, 30.0), tmp_path)


def test_findings_follow_the_results(tmp_path: Path) -> None:
    low = {
        f"low-{rows}-{method}-{seed}": result(50 + (method == "prefix") * (250 - rows) / 10 + seed)
        for rows in ROW_COUNTS
        for method in ("prefix", "finetune")
        for seed in SEEDS
    }
    text = report({**low, **unseen(30.0, 31.0)}, tmp_path)
    assert "it holds in part; it is ahead, by the mean of seeds, with 50, 100, 200 of" in text
    assert "it does not hold; there it is 1.0 BLEU behind" in text
    assert "| 50 | 71.0, 72.0 | 51.0, 52.0 |" in text
    assert (tmp_path / "images" / "quality-low-data.png").read_bytes().startswith(b"\x89PNG")
