"""The benchmarks run, and what they keep and draw is what was measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common import DATA, ROOT
from benchmarks.peers.peer import Peer, PeerSpec
from benchmarks.plot import draw
from benchmarks.targets import TARGETS


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "e2e").is_dir(), reason=f"needs the E2E data at {DATA}")
def test_every_benchmark_prints_its_json_line() -> None:
    command = [sys.executable, "-m", "benchmarks", "--smoke"]
    finished = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "failed" not in finished.stdout


def peer(python: str, module: str) -> PeerSpec:
    return PeerSpec("peer", Path(python), (module,), frozenset({1}), {})


@pytest.mark.parametrize(
    ("python", "module", "reason"),
    [
        ("no-such-python", "anything", "no interpreter at no-such-python"),
        (sys.executable, "benchmarks.peers.nothing", "No module named"),
    ],
)
def test_an_absent_peer_says_why(python: str, module: str, reason: str) -> None:
    with Peer(peer(python, module)) as absent:
        assert reason in (absent.status["absent"] or "")


def test_a_peer_that_cannot_load_is_absent_with_its_own_reason(tmp_path: Path) -> None:
    arguments = ("benchmarks.peers.transformers_worker", str(tmp_path / "no-model"))
    spec = PeerSpec("static", Path(sys.executable), arguments, frozenset({1}), {})
    with Peer(spec) as absent:
        assert "no-model" in (absent.status["absent"] or "")


def test_the_plot_is_drawn_from_what_is_there(tmp_path: Path) -> None:
    rate = {"min": 1.0, "median": 2.0, "max": 3.0}
    peers = {"results": {"tokens_per_second": {"1": {"engine": rate, "vllm_base": rate}}}}
    ratios = {"vs_vllm_base_1": 1.0, "not_a_target": 3.0}
    draw({"benchmarks": {"peers": peers}, "ratios": ratios}, tmp_path / "images" / "plot.png")
    draw({"benchmarks": {}, "ratios": {}}, tmp_path / "empty.png")
    assert (tmp_path / "images" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_score_of_one_meets_the_target() -> None:
    assert TARGETS["vs_vllm_base_32"].score(1.5) == 1
    assert TARGETS["cold_ttft_added_p99_ms"].score(30) == 0.5
