"""What the benchmarks share: the model, real prompts, random prefixes, and one way to report."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from prefix_store.model_loading import (
    DEFAULT_MODEL,
    LoadedModel,
    default_device,
    default_dtype,
    load_base_model,
)
from prefix_store.prefix import Prefix

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("PREFIXSERVE_DATA", ROOT.parent / "shared" / "data"))
PREFIX_LENGTH = 16
NEW_TOKENS = 64


def arguments(description: str) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds (default 5)")
    return parser


def data_file(name: str, part: str) -> Path:
    """One file of the data; exits with a clear message where it is not there."""
    path = DATA / name / f"{part}.jsonl"
    if not path.is_file():
        sys.exit(f"no data at {path}; set PREFIXSERVE_DATA to the folder that has {name}")
    return path


def load_model(dtype: torch.dtype | None = None) -> LoadedModel:
    """The default model as a server would load it."""
    device = default_device()
    return load_base_model(
        DEFAULT_MODEL,
        device=device,
        dtype=dtype or default_dtype(device),
        cache_dir=ROOT / ".cache" / "models",
    )


def prompts(loaded: LoadedModel, count: int) -> list[tuple[int, ...]]:
    """Token ids of `count` E2E rows; see `prompt_texts`."""
    return [tuple(loaded.tokenizer(text)["input_ids"]) for text in prompt_texts(count)]


def prompt_texts(count: int) -> list[str]:
    """`count` E2E rows, each with a newline, from the first again where they are too few.

    Exits with a clear message where the data is not there.
    """
    lines = data_file("e2e", "dev").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)["source"] for line in lines]
    return [rows[i % len(rows)] + "\n" for i in range(count)]


def random_prefix(loaded: LoadedModel, length: int, seed: int) -> Prefix:
    """Keys and values of no meaning, in the model's dtype: speed does not depend on them."""
    spec, generator = loaded.spec, torch.Generator().manual_seed(seed)
    shape = (spec.num_layers, spec.num_kv_heads, length, spec.head_dim)
    keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
    return Prefix.of(keys, values, method="random").to(loaded.model.device, loaded.model.dtype)


def alternate(
    rounds: int, measures: Mapping[str, Callable[[], float]]
) -> dict[str, dict[str, float]]:
    """Take every measure in turn, `rounds` times after one warm-up; minimum, median, maximum.

    Taking turns cancels the drift of a machine that is shared.
    """
    for measure in measures.values():
        measure()
    taken: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            taken[name].append(measure())
    return {
        name: {"min": min(xs), "median": statistics.median(xs), "max": max(xs)}
        for name, xs in taken.items()
    }


def report(name: str, results: Mapping[str, Any], ratios: Mapping[str, float]) -> None:
    """Print the benchmark's JSON line."""
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    line = {"benchmark": name, "machine": machine, "results": results, "ratios": ratios}
    sys.stdout.write(json.dumps(line) + "\n")
