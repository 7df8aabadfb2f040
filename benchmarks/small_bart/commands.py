"""`prefixserve` commands in processes of their own, and what they cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT

WORK = ROOT / ".cache" / "small-bart"
DATA = WORK / "data"
RUNS = WORK / "runs"


def prefixserve(*arguments: str | Path) -> dict[str, Any]:
    """What a command prints as JSON, and `wall_seconds` and `cpu_seconds` of its process.

    It computes on one thread: to share out work this small costs more than it saves. Exits with a
    clear message where the command fails.
    """
    command = [sys.executable, "-m", "clients", *map(str, arguments), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None  # noqa: S101 - a pipe
        text = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(
            f"`prefixserve {arguments[0]}` failed; run the same command again to go on"
        )
    printed: dict[str, Any] = json.loads(text)
    return printed | {
        "wall_seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
    }


def train(name: str, data: str, *flags: str | Path) -> dict[str, Any]:
    """Train a run, or go on with it where it stopped; one that is done is not done again.

    Args:
        name: of its folder below `RUNS`.
        data: of its files below `DATA`.

    Returns:
        What `prefixserve` gives, and whether the run was resumed: its times are then those of its
        last part.
    """
    kept, output = WORK / f"{name}.json", RUNS / name
    if kept.is_file():
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return found
    resumed = (output / "run.json").is_file()
    train_rows, dev_rows = (DATA / f"{data}-{part}.jsonl" for part in ("train", "dev"))
    files: list[str | Path] = ["--data", train_rows, "--dev", dev_rows]
    again = ["--resume"] if resumed else []
    how: list[str | Path] = ["--template", "{source}", "--dtype", "float32", "--output", output]
    facts = prefixserve("train", name, *files, *how, *flags, *again) | {"resumed": resumed}
    del facts["path"]
    kept.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return facts
