"""Decode throughput of the engine, beside what its matrix products alone would take.

    python -m benchmarks.engine

Sequences of E2E prompts generate 64 tokens each: without a prefix, all with one task's prefix, and
each with its own task's, and that once more with int8 weights. The matrix products alone are
those of a step of as many rows, packed and fused: `matmul` by oneDNN, `own_matmul` by our kernels.
"""

from __future__ import annotations

import time
from collections.abc import Callable
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
from benchmarks.products import Step, onednn_step, own_step
from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix
from server.engine.choose_runner import choose_runner
from server.engine.core import EngineCore
from server.engine.packed_model import pack
from server.engine.protocol import (
    CompiledGrammar,
    EngineConfig,
    GenerationRequest,
    SamplingParams,
)
from server.engine.runner import Runner
from server.engine.sequence import Sequence
from server.engine.special_tokens import SpecialTokens

MAX_SLOTS, MAX_LENGTH = 64, 256


def decode_rate(
    runner: Runner,
    prompt_ids: list[tuple[int, ...]],
    prefixes: list[Prefix | None],
    new: int,
    grammars: list[CompiledGrammar | None] | None = None,
) -> float:
    """Tokens per second of one batch from the first token of all to the last."""
    core = EngineCore(runner, EngineConfig(max_slots=MAX_SLOTS), SpecialTokens())
    params = SamplingParams(max_new_tokens=new)
    grammars = grammars or [None] * len(prompt_ids)
    sequences = [
        Sequence(GenerationRequest(str(i), ids, params, grammar=grammar), prefix)
        for i, (ids, prefix, grammar) in enumerate(zip(prompt_ids, prefixes, grammars, strict=True))
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
def product_rate(step: Step, rows: int, steps: int) -> float:
    """Tokens per second if a step were its matrix products and nothing else."""
    started = time.perf_counter()
    for _ in range(steps):
        step()
    return rows * steps / (time.perf_counter() - started)


def measures(
    loaded: LoadedModel, runners: dict[str, Runner], *, size: int, new: int
) -> dict[str, Callable[[], float]]:
    """Every kind of batch of `size` sequences, and the products alone, by name."""
    prompt_ids = prompts(loaded, size)
    own = [random_prefix(loaded, PREFIX_LENGTH, seed) for seed in range(size)]
    rate = partial(decode_rate, runners[""], prompt_ids, new=new)
    found: dict[str, Callable[[], float]] = {
        "no_prefix": partial(rate, [None] * size),
        "one_task": partial(rate, [own[0]] * size),
        "own_task": partial(rate, list(own)),
    }
    if "int8" in runners:
        found["int8"] = partial(decode_rate, runners["int8"], prompt_ids, list(own), new)
    packed = pack(loaded.model, MAX_LENGTH) if loaded.model.device.type == "cpu" else None
    if packed is not None:
        found["matmul"] = partial(product_rate, onednn_step(loaded, size), size, new)
        found["own_matmul"] = partial(product_rate, own_step(packed, size), size, new)
    return found


def ratios_of(medians: dict[str, float], size: int) -> dict[str, float]:
    """The ratios of one size of batch."""
    pairs = {
        "mixed_vs_single": ("own_task", "one_task"),
        "prefix_vs_none": ("own_task", "no_prefix"),
        "vs_matmul": ("own_task", "matmul"),
        "vs_own_matmul": ("own_task", "own_matmul"),
        "int8_vs_bfloat16": ("int8", "own_task"),
    }
    return {
        f"{name}_{size}": medians[over] / medians[under]
        for name, (over, under) in pairs.items()
        if over in medians and under in medians
    }


def main() -> None:
    """Run and report."""
    options = arguments(__doc__ or "").parse_args()
    sizes, new = ((2,), 4) if options.smoke else ((1, 8, 32, 64), NEW_TOKENS)
    rounds = 1 if options.smoke else options.rounds
    loaded = load_model()
    runners = {"": choose_runner(loaded, MAX_SLOTS, MAX_LENGTH)}
    if loaded.model.device.type == "cpu":
        runners["int8"] = choose_runner(loaded, MAX_SLOTS, MAX_LENGTH, int8=True)
    results: dict[str, dict[str, dict[str, float]]] = {}
    ratios: dict[str, float] = {}
    for size in sizes:
        rates = alternate(rounds, measures(loaded, runners, size=size, new=new))
        medians = {name: rate["median"] for name, rate in rates.items()}
        results[str(size)] = rates
        ratios |= ratios_of(medians, size)
        if not options.json:
            print(f"{size:3} sequences: " + ", ".join(f"{n} {r:.0f}" for n, r in medians.items()))
    report("engine", results, ratios)


if __name__ == "__main__":
    main()
