"""`prefixserve plan`: its arithmetic, and its hit rates beside a simulated cache's."""

from __future__ import annotations

import json
import random
from collections import OrderedDict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from typer.testing import CliRunner, Result

from clients.cli import app
from clients.planning import Machine, ModelSize, Speed, Workload, lru_hit_rate, make_plan, zipf
from clients.planning.model_size import model_size
from server.settings import Settings
from tests.conftest import TINY_CONFIGS, TINY_ENCODER_DECODERS

MODEL = ModelSize("m", 10**9, 2, 100_000, 100_000, 4096)
MACHINE = Machine("cuda", 24 * 10**9, max_slots=64, max_length=1000, host_cache_bytes=32 * 10**9)
WORKLOAD = Workload(
    tasks=40_000,
    prefix_length=16,
    zipf=1.0,
    requests_per_second=100,
    prompt_tokens=50,
    new_tokens=100,
    versions=2,
)
SPEED = Speed(tokens_per_second=5000)


def simulated_hit_rate(shares: list[float], capacity: int, requests: int) -> float:
    """Of the second half of the requests to a real LRU cache."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    drawn = random.Random(2).choices(range(len(shares)), shares, k=requests)
    for number, task in enumerate(drawn):
        if task in cache:
            cache.move_to_end(task)
            hits += number >= requests // 2
        else:
            cache[task] = None
            if len(cache) > capacity:
                cache.popitem(last=False)
    return hits / (requests - requests // 2)


@pytest.mark.parametrize("exponent", [0.0, 0.7, 1.0, 1.4])
@pytest.mark.parametrize("capacity", [1, 20, 300])
def test_the_expected_hit_rate_is_that_of_a_simulated_cache(exponent: float, capacity: int) -> None:
    shares = zipf(1000, exponent)
    found = simulated_hit_rate(shares.tolist(), capacity, requests=60_000)
    assert lru_hit_rate(shares, capacity) == pytest.approx(found, abs=0.015)


@given(
    tasks=st.integers(1, 300), exponent=st.floats(0, 3), capacities=st.lists(st.integers(0, 300))
)
def test_more_room_never_hits_less(tasks: int, exponent: float, capacities: list[int]) -> None:
    shares = zipf(tasks, exponent)
    assert shares.sum() == pytest.approx(1)
    rates = [lru_hit_rate(shares, capacity) for capacity in sorted(capacities)]
    assert all(0 <= rate <= 1 for rate in rates)
    assert all(more >= less - 1e-6 for less, more in pairwise(rates))


def test_a_cache_of_all_tasks_always_hits() -> None:
    assert lru_hit_rate(zipf(100, 1), 100) == 1
    assert lru_hit_rate(zipf(100, 1), 0) == 0
    assert lru_hit_rate(np.full(100, 0.01), 25) == pytest.approx(0.25)


def test_memory_is_shared_out_whole() -> None:
    memory = make_plan(MODEL, MACHINE, WORKLOAD, SPEED).memory
    assert (memory.weights, memory.slots) == (2 * 10**9, 64 * 1000 * 100_000)
    assert memory.headroom == 24 * 10**8
    parts = memory.headroom + memory.runtime + memory.weights + memory.slots + memory.prefixes
    assert parts == memory.total


def test_prefixes_replicas_and_the_store() -> None:
    plan = make_plan(MODEL, MACHINE, WORKLOAD, SPEED)
    assert plan.prefix_bytes == 1_600_000
    assert plan.resident == plan.memory.prefixes // 1_600_000
    assert plan.replicas == 3  # 10,000 tokens/s of 5000 × 0.8
    shares = zipf(40_000, 1)
    assert plan.round_robin.device == lru_hit_rate(shares, plan.resident)
    assert plan.hashed.device == lru_hit_rate(shares, 3 * plan.resident)
    assert plan.hashed.host == lru_hit_rate(shares, 3 * 20_000) == 1
    assert plan.round_robin.host == lru_hit_rate(shares, 20_000) < 1
    assert plan.store.bytes == 40_000 * 2 * (1_600_000 + 1_600)
    assert plan.store.bytes_per_second == 0


def test_what_no_memory_has_is_loaded_from_the_store() -> None:
    machine = replace(MACHINE, host_cache_bytes=0)
    plan = make_plan(MODEL, machine, WORKLOAD, SPEED)
    assert plan.hashed.host == plan.hashed.device < 1
    assert plan.store.loads_per_second == pytest.approx(100 * (1 - plan.hashed.device))
    assert plan.store.bytes_per_second == pytest.approx(plan.store.loads_per_second * 1_601_600)
    assert plan.store.bytes_per_second_round_robin > plan.store.bytes_per_second


def test_a_speed_is_estimated_by_what_binds_a_step() -> None:
    def tokens_per_second(bandwidth: float, flops: float) -> float:
        speed = Speed(memory_bandwidth=bandwidth, flops=flops)
        return make_plan(MODEL, MACHINE, WORKLOAD, speed).tokens_per_second

    read = 2 * 10**9 + 64 * (16 + 50 + 50) * 100_000
    assert tokens_per_second(1e12, 1e20) == pytest.approx(0.5 * 64 * 1e12 / read)
    rows = 64 * (1 + 50 / 100)
    assert tokens_per_second(1e20, 1e14) == pytest.approx(0.5 * 64 * 1e14 / (2e9 * rows))
    with pytest.raises(ValueError, match="bandwidth"):
        tokens_per_second(None, 1e14)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [*TINY_CONFIGS, *TINY_ENCODER_DECODERS])
def test_a_model_is_measured_by_its_config_alone(shape: str, tmp_path: Path) -> None:
    config = {**TINY_CONFIGS, **TINY_ENCODER_DECODERS}[shape]
    config.save_pretrained(tmp_path)
    size = model_size(str(tmp_path), dtype=torch.bfloat16, cache_dir=tmp_path)
    auto = AutoModelForSeq2SeqLM if shape in TINY_ENCODER_DECODERS else AutoModelForCausalLM
    model = auto.from_config(config)
    assert size.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert size.number_bytes == 2


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments])


FLAGS = ("--tasks", "100", "--tokens-per-second", "1000")


def test_the_command_plans_and_prints(tiny_llama_dir: Path) -> None:
    flags = (*FLAGS, "--model", str(tiny_llama_dir), "--dtype", "float32", "--max-slots", "8")
    found = run(*flags, "--cpu-memory", "2GB", "--requests-per-second", "100", "--json")
    assert found.exit_code == 0, found.output
    plan = json.loads(found.output)
    own = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, numbers, bytes
    assert plan["memory"]["slots"] == 8 * 512 * own  # as many positions as the model has
    assert plan["prefix_bytes"] == 16 * own
    assert plan["replicas"] == 8
    shown = run(*flags, "--gpu-memory", "2GB")
    assert shown.exit_code == 0, shown.output
    for line in ("weights", "8 of 512 positions", "100 of 100 tasks", "hit rate, hashed"):
        assert line in " ".join(shown.output.split()), shown.output


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (FLAGS, 2, "--gpu-memory and --cpu-memory"),
        ((*FLAGS, "--gpu-memory", "1GB", "--cpu-memory", "1GB"), 2, "give one of"),
        (("--tasks", "9", "--gpu-memory", "1GB", "--tflops", "9"), 2, "--tokens-per-second"),
        ((*FLAGS, "--gpu-memory", "many"), 2, "no size"),
        ((*FLAGS, "--gpu-memory", "1GB"), 1, "are missing for a single prefix"),
        ((*FLAGS, "--gpu-memory", "8GB", "--new-tokens", "600"), 1, "a slot has 512"),
        (
            (*FLAGS, "--gpu-memory", "8GB", "--model", "./nowhere"),
            1,
            "no folder with a config.json",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused(
    flags: tuple[str, ...], code: int, words: str, tiny_llama_dir: Path
) -> None:
    if "--model" not in flags:
        flags = (*flags, "--model", str(tiny_llama_dir))
    found = run(*flags)
    assert found.exit_code == code, found.output
    assert words in " ".join(found.output.replace("│", " ").split()), found.output


def test_the_defaults_are_the_servers() -> None:
    found = CliRunner().invoke(app, ["plan", "--help"], terminal_width=200)
    for name in ("max_slots", "max_length"):
        assert f"{Settings.model_fields[name].default}]" in found.output
