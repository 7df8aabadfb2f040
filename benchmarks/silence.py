"""Whether the time of an answer tells another tenant's task from one that does not exist.

    python -m benchmarks.silence

A server process with two tenants. One has a task, whose prefix is in memory; the other asks for it
and for a task that nobody has, in random order on one connection, by generating and as an
administrator. Both are answered 404. Told are the medians, how often the other tenant's task takes
longer (half of the time if nothing is to be told), and the probability of so much by chance: the
test of Mann and Whitney, by its normal approximation.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common import PREFIX_LENGTH, arguments, load_model, random_prefix, report
from benchmarks.http import ServerProcess, running_server

OWNER, STRANGER = "owner", "stranger"
THERE, MISSING = "there", "where"  # of one length, as a name's length can cost time
ROUNDS = 2000


def longer(ones: list[float], others: list[float]) -> tuple[float, float]:
    """How often one of `ones` is above one of `others`, and the two-sided p-value of that.

    Mann & Whitney 1947. Times that are equal to the nanosecond are too few to correct for.
    """
    ranked = sorted([(x, True) for x in ones] + [(x, False) for x in others])
    ranks = sum(rank for rank, (_, is_one) in enumerate(ranked, 1) if is_one)
    n, m = len(ones), len(others)
    above = ranks - n * (n + 1) / 2
    z = (above - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12)
    return above / (n * m), math.erfc(abs(z) / math.sqrt(2))


def client_of(server: ServerProcess, key: str) -> httpx.Client:
    """Asks with a key, on a connection that stays."""
    return httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {key}"}, timeout=60)


def compare(ask: Callable[[str], httpx.Response], rounds: int) -> dict[str, float]:
    """Ask for both tasks so many times."""
    rng = random.Random(0)  # noqa: S311 - not for secrets
    seconds: dict[str, list[float]] = {THERE: [], MISSING: []}
    for number in range(rounds + rounds // 10):
        for task in rng.sample([THERE, MISSING], 2):
            started = time.perf_counter()
            answer = ask(task)
            taken = time.perf_counter() - started
            if answer.status_code != HTTPStatus.NOT_FOUND:
                raise SystemExit(f"expected 404, not {answer.status_code}: {answer.text[:200]}")
            if number >= rounds // 10:  # the first ones warm everything up
                seconds[task].append(taken)
    share, p_value = longer(seconds[THERE], seconds[MISSING])
    medians = {task: 1e6 * statistics.median(taken) for task, taken in seconds.items()}
    return {
        "anothers_median_us": medians[THERE],
        "missing_median_us": medians[MISSING],
        "anothers_takes_longer": share,
        "p_value": p_value,
    }


def measure(server: ServerProcess, artefact: bytes, rounds: int) -> dict[str, Any]:
    """Every figure."""
    body = {"inputs": "Hi", "parameters": {"max_new_tokens": 1}}
    keys = {}
    with client_of(server, (server.data_dir / "admin.key").read_text().strip()) as operator:
        for tenant in (OWNER, STRANGER):
            asked = {"tenant": tenant, "scopes": ["generate", "admin"]}
            answer = operator.post("/admin/keys", json=asked).raise_for_status()
            keys[tenant] = answer.json()["key"]
    with client_of(server, keys[OWNER]) as owner:
        owner.put(f"/admin/tasks/{THERE}", files={"file": artefact}).raise_for_status()
        owner.post("/generate", json=body | {"task_id": THERE}).raise_for_status()
    with client_of(server, keys[STRANGER]) as stranger:
        return {
            "generate": compare(
                lambda task: stranger.post("/generate", json=body | {"task_id": task}), rounds
            ),
            "admin": compare(lambda task: stranger.get(f"/admin/tasks/{task}"), rounds),
        }


def main() -> None:
    """Run and report."""
    options = arguments(__doc__ or "").parse_args()
    artefact = random_prefix(load_model(), PREFIX_LENGTH, seed=0).to_bytes()
    rounds = 20 if options.smoke else ROUNDS * options.rounds // 5
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server("--max-slots", "4", log=Path(folder) / "server.log") as server,
    ):
        results = measure(server, artefact, rounds)
    if not options.json:
        print(json.dumps(results, indent=2))
    report(
        "silence",
        results,
        {
            f"{way}_anothers_task_vs_missing": found["anothers_median_us"]
            / found["missing_median_us"]
            for way, found in results.items()
        },
    )


if __name__ == "__main__":
    main()
