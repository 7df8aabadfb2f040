"""Train and score every run of the plan, and write `docs/quality.md` with its plots.

    python -m benchmarks.quality [--only methods,low_data] [--report]

About three hours on two cores. Each run is kept in `.cache/quality/NAME` as it ends; those that are
there are not done again, and one that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from benchmarks.common import ROOT
from benchmarks.quality.data import split
from benchmarks.quality.plan import EXPERIMENTS, Run, plan
from benchmarks.quality.report import write_report
from benchmarks.quality.run import RESULT, carry_out, score_base_model
from benchmarks.quality.texts import BASES
from clients import TrainingInterruptedError

RUNS = ROOT / ".cache" / "quality"
KEPT = ROOT / "benchmarks" / "results" / "quality.json"


def main() -> None:
    """Do what is missing, keep the results in one file, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help=f"comma-separated, of {', '.join(EXPERIMENTS)}")
    parser.add_argument("--report", action="store_true", help="train nothing, write the report")
    options = parser.parse_args()
    only = options.only.split(",") if options.only else EXPERIMENTS
    if unknown := set(only) - set(EXPERIMENTS):
        parser.error(f"no experiment {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}")
    if not options.report:
        _carry_out([run for run in plan() if run.experiment in only])
    results = {**_kept(), **_found()}
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    KEPT.write_text(json.dumps(results, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
    write_report(results, ROOT / "docs")


def _carry_out(runs: list[Run]) -> None:
    console = Console(stderr=True)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    if runs[0].experiment == "methods":
        for name in BASES:
            if not (RUNS / name / RESULT).is_file():
                score_base_model(name, split(runs[0]), RUNS / name)
    for number, run in enumerate(runs, 1):
        if (RUNS / run.name / RESULT).is_file():
            continue
        console.print(f"[{number}/{len(runs)}] {run.name}")
        try:
            carry_out(run, split(run), RUNS, console)
        except TrainingInterruptedError as error:
            sys.exit(f"{run.name}: {error.args[0].partition(';')[0]}; run the same command again")


def _found() -> dict[str, Any]:
    return {path.parent.name: _read(path) for path in sorted(RUNS.glob(f"*/{RESULT}"))}


def _kept() -> dict[str, Any]:
    return _read(KEPT) if KEPT.is_file() else {}


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


if __name__ == "__main__":
    main()
