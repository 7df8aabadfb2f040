"""Decode throughput of the engine, beside what its matrix products alone would take.

    python -m benchmarks.engine

Sequences of E2E prompts generate 64 tokens each: without a prefix, all with one task's prefix, and
each with its own task's. The matrix products are the same packed, fused ones, on as many rows.
"""

from __future__ import annotations

import time
from functools import partial

import torch

from benchmarks.common import (
    NEW_TOKENS,
    PREFIX_LENGTH,
    alternate,
    arguments,
    load_model,
    prompts,
    random_prefix,
    report,
)
from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix
from server.engine.core import EngineCore
from server.engine.native import choose_runner
from server.engine.packed_model import PackedModel, pack
from server.engine.protocol import EngineConfig, GenerationRequest, SamplingParams
from server.engine.runner import Runner
from server.engine.sequence import Sequence

MAX_SLOTS, MAX_LENGTH = 64, 256


def decode_rate(
    runner: Runner, prompt_ids: list[tuple[int, ...]], prefixes: list[Prefix | None], new: int
) -> float:
    """Tokens per second of one batch from the first token of all to the last."""
    core = EngineCore(runner, EngineConfig(max_slots=MAX_SLOTS), eos_token_ids=frozenset())
    sequences = [
        Sequence(GenerationRequest(str(i), ids, SamplingParams(max_new_tokens=new)), prefix)
        for i, (ids, prefix) in enumerate(zip(prompt_ids, prefixes, strict=True))
    ]
    for sequence in sequences:
        core.add(sequence)
    while not all(sequence.output_ids for sequence in sequences):
        core.step()
    started, tokens = time.perf_counter(), 0
    while core.has_work:
        tokens += len(core.step().events)
    return tokens / (time.perf_counter() - started)


@torch.inference_mode()
def matmul_rate(packed: PackedModel, rows: int, steps: int) -> float:
    """Tokens per second if a step were its matrix products and nothing else."""
    dtype = packed.embedding.dtype
    hidden = torch.randn(rows, packed.hidden_size).to(dtype)
    mixed = torch.randn(rows, packed.num_heads * packed.head_dim).to(dtype)
    gated = torch.randn(rows, packed.intermediate_size).to(dtype)
    started = time.perf_counter()
    for _ in range(steps):
        for layer in packed.layers:
            layer.qkv(hidden)
            layer.output(mixed)
            layer.gate_up(hidden)
            layer.down(gated)
        packed.head(hidden)
    return rows * steps / (time.perf_counter() - started)


def measure(
    loaded: LoadedModel,
    runner: Runner,
    packed: PackedModel | None,
    *,
    size: int,
    rounds: int,
    new: int,
) -> dict[str, dict[str, float]]:
    """Every kind of batch of `size` sequences, alternating."""
    prompt_ids = prompts(loaded, size)
    own = [random_prefix(loaded, PREFIX_LENGTH, seed) for seed in range(size)]
    rate = partial(decode_rate, runner, prompt_ids, new=new)
    measures = {
        "no_prefix": partial(rate, [None] * size),
        "one_task": partial(rate, [own[0]] * size),
        "own_task": partial(rate, list(own)),
    }
    if packed is not None:
        measures["matmul"] = partial(matmul_rate, packed, size, new)
    return alternate(rounds, measures)


def main() -> None:
    """Run and report."""
    options = arguments(__doc__ or "").parse_args()
    sizes, new = ((2,), 4) if options.smoke else ((1, 8, 32, 64), NEW_TOKENS)
    rounds = 1 if options.smoke else options.rounds
    loaded = load_model()
    runner = choose_runner(loaded, MAX_SLOTS, MAX_LENGTH)
    packed = pack(loaded.model, MAX_LENGTH) if loaded.model.device.type == "cpu" else None
    results, ratios = {}, {}
    for size in sizes:
        rates = measure(loaded, runner, packed, size=size, rounds=rounds, new=new)
        medians = {name: rate["median"] for name, rate in rates.items()}
        results[str(size)] = rates
        if not options.json:
            print(f"{size:3} sequences: " + ", ".join(f"{n} {r:.0f}" for n, r in medians.items()))
        ratios[f"mixed_vs_single_{size}"] = medians["own_task"] / medians["one_task"]
        ratios[f"prefix_vs_none_{size}"] = medians["own_task"] / medians["no_prefix"]
        if packed is not None:
            ratios[f"vs_matmul_{size}"] = medians["own_task"] / medians["matmul"]
    report("engine", results, ratios)


if __name__ == "__main__":
    main()
