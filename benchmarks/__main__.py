"""Run the benchmarks one after another, keep their results and draw them.

    python -m benchmarks [--only engine,http] [--smoke]

Each runs in a process of its own. Results are merged into `benchmarks/results/latest.json`: a
benchmark that was not run keeps what it last measured, with its own date. `--smoke` runs each for a
few seconds, two at a time, checks that it prints its JSON line, and keeps nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

from benchmarks.launch import ROOT, Launch, as_command, command_of, forked
from benchmarks.plot import draw

LATEST = ROOT / "benchmarks" / "results" / "latest.json"
PLOT = ROOT / "docs" / "images" / "performance.png"
NAMES = tuple(
    name
    for name in (
        "engine",
        "http",
        "peers",
        "tasks",
        "cold",
        "balancing",
        "shared_prefix",
        "structured",
        "int8",
        "training",
        "fairness",
        "silence",
    )
    if importlib.util.find_spec(f"benchmarks.{name}")
)
_SMOKE_WORKERS = 2
_SMOKE_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def run(name: str, extra: Sequence[str], launch: Launch) -> dict[str, Any]:
    """One benchmark's JSON line, with the date and the command.

    Raises:
        subprocess.CalledProcessError: it failed.
        ValueError: its last line is not a JSON object with results and ratios.
    """
    printed = launch(name, [*extra, "--json"])
    last = (printed.strip().splitlines() or [""])[-1]
    result = json.loads(last)
    if not isinstance(result, dict) or not {"results", "ratios"} <= result.keys():
        raise ValueError(f"expected a JSON object with results and ratios, found {last[:200]}")
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {"date": date, "command": " ".join(command_of(name, extra)), **result}


def merge(measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What was kept with `measured` put over it, and all ratios in one object."""
    kept = json.loads(LATEST.read_text())["benchmarks"] if LATEST.is_file() else {}
    benchmarks = {**kept, **measured}
    ratios = {key: value for b in benchmarks.values() for key, value in b["ratios"].items()}
    return {"ratios": ratios, "benchmarks": benchmarks}


def run_all(
    names: Sequence[str], extra: Sequence[str], *, smoke: bool
) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Each benchmark's result in their order, None for one that failed; says how each went."""

    def attempt(name: str) -> tuple[dict[str, Any] | None, str]:
        started = time.monotonic()
        try:
            result = run(name, extra, launch)
        except (subprocess.CalledProcessError, ValueError) as error:
            return None, f"failed: {error}"
        return result, f"{time.monotonic() - started:.0f} s"

    if smoke:
        os.environ |= _SMOKE_ENVIRONMENT
    launch = forked(names) if smoke else as_command
    # Only timings need the machine to themselves, and of a smoke run none are kept.
    with ThreadPoolExecutor(_SMOKE_WORKERS if smoke else 1) as pool:
        attempts = [pool.submit(attempt, name) for name in names]
        for number, (name, future) in enumerate(zip(names, attempts, strict=True), 1):
            print(f"[{number}/{len(names)}] {name} ...", end=" ", flush=True)
            result, how = future.result()
            print(how)
            yield name, result


def main() -> None:
    """Run, keep, draw; exit with 1 if any benchmark failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help=f"comma-separated, of {', '.join(NAMES)}")
    parser.add_argument("--smoke", action="store_true", help="a few seconds each, keeps nothing")
    parser.add_argument("--rounds", type=int, help="alternating rounds of each")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else NAMES
    if unknown := set(names) - set(NAMES):
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")
    extra = ["--smoke"] if options.smoke else []
    extra += ["--rounds", str(options.rounds)] if options.rounds else []
    # The first one is the shortest in a smoke run, and nothing long should run alone at its end.
    order = names[::-1] if options.smoke else names
    results = dict(run_all(order, extra, smoke=options.smoke))
    measured = {name: result for name, result in results.items() if result is not None}
    if measured and not options.smoke:
        latest = merge(measured)
        LATEST.parent.mkdir(parents=True, exist_ok=True)
        LATEST.write_text(json.dumps(latest, indent=2) + "\n")
        draw(latest, PLOT)
        print(f"wrote {LATEST.relative_to(ROOT)} and {PLOT.relative_to(ROOT)}")
    if failed := [name for name in names if name not in measured]:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
