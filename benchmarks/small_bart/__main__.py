"""Train a small BART from scratch, teach it two tasks by prefixes, and score these on a server.

    python -m benchmarks.small_bart

The base learns to repair texts and to put WebNLG's facts into words. Frozen, it is taught to
describe restaurants (E2E, of which it has not seen which text belongs to which facts) and to keep
the first sentence of a text, with a prefix in all three places or in the decoder alone, where PEFT
can put one: the same number of vectors. Everything is done with `prefixserve train`, `serve` and
`eval`. Runs are kept in `.cache/small-bart`; those that are there are not done again, and one that
was interrupted goes on from its last checkpoint. Results go to
`benchmarks/results/small_bart.json`, and `docs/small-bart.md` is written from them.
"""

from __future__ import annotations

import json
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import torch

from benchmarks.common import ROOT
from benchmarks.http import running_server
from benchmarks.small_bart.base import save_start
from benchmarks.small_bart.commands import DATA, RUNS, WORK, train
from benchmarks.small_bart.data import COMPRESSION, E2E, SEED, read_texts, write_files
from benchmarks.small_bart.report import write_report
from benchmarks.small_bart.scoring import Scores, score_base, score_task
from clients import Client
from clients.data import read_rows
from clients.training.run_folder import PREFIX_FILE

PAGE = ROOT / "docs" / "small-bart.md"
KEPT = ROOT / "benchmarks" / "results" / "small_bart.json"
START, BASE = WORK / "start", RUNS / "base" / "model"
ROWS, BATCH = 40_000, 32
_NUM_EXAMPLES = 3
_BASE_FLAGS = (
    *("--method", "finetune", "--learning-rate", "1.5e-3", "--warmup", "0.05"),
    *("--batch-size", str(BATCH), "--epochs", "1", "--patience", "0"),
)
_TASK_FLAGS = ("--batch-size", "16", "--learning-rate", "3e-3", "--warmup", "0.05")
_STEPS = {E2E: 400, COMPRESSION: 200}
_WORKERS = 2
WHERE = {
    "all": ("--prefix-length", "16"),
    "decoder": ("--where", "decoder", "--prefix-length", "48"),
}


def main() -> None:
    """Do what is missing, and keep the results."""
    write_files(DATA, ROWS)
    if not (START / "tokenizer.json").is_file():
        save_start(START, read_texts(), SEED)
    base = train("base", "base", "--base-model", START, *_BASE_FLAGS)
    with ThreadPoolExecutor(_WORKERS) as pool:
        futures = {
            f"{task}-{where}": pool.submit(_train_task, task, where)
            for task in _STEPS
            for where in WHERE
        }
        trainings = {name: future.result() for name, future in futures.items()}
    with running_server("--model", str(BASE), "--dtype", "float32") as server:
        tasks = {task: _scored(server.url, task) for task in _STEPS}
    results = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
        },
        "rows": ROWS,
        "base": base,
        "trainings": trainings,
        "tasks": tasks,
    }
    KEPT.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_report(results, PAGE)


def _train_task(task: str, where: str) -> dict[str, Any]:
    flags = (*_TASK_FLAGS, "--max-steps", str(_STEPS[task]), *WHERE[where])
    return train(f"{task}-{where}", task, "--base-model", BASE, *flags)


def _scored(url: str, data: str) -> dict[str, Any]:
    """A task's scores by how its texts were written, and some of the texts."""
    written: dict[str, tuple[Scores, list[str]]] = {"without a prefix": score_base(url, data)}
    with Client(url) as client:
        for where in WHERE:
            client.upload(f"{data}-{where}", RUNS / f"{data}-{where}" / PREFIX_FILE)
    for where in WHERE:
        written[where] = score_task(url, f"{data}-{where}", data)
    written["all, 4 beams"] = score_task(url, f"{data}-all", data, "--num-beams", "4")
    rows = read_rows(DATA / f"{data}-dev.jsonl")
    examples = [
        {
            "source": row.source,
            "reference": row.references[0],
            **{name: texts[i] for name, (_, texts) in written.items()},
        }
        for i, row in enumerate(rows[:_NUM_EXAMPLES])
    ]
    scores = {name: found for name, (found, _) in written.items()}
    return {"rows": len(rows), "scores": scores, "examples": examples}


if __name__ == "__main__":
    main()
