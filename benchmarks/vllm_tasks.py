"""Tasks on the vLLM engine, beside its base model and vLLM's own LoRA adapters.

    .venv-vllm/bin/python -m benchmarks.vllm_tasks [--sequences 32] [--no-lora]

Sequences of E2E prompts generate 64 tokens each through `VllmEngine`: without a prefix, and each
with a task of its own (prefix length 16); and through the same `AsyncLLM`, started with LoRA in
place of the connector, each with an adapter of its own. The rate is generated tokens divided by the
wall time of the whole batch. No engine keeps prompts between rounds: each round's begin with a
number of their own.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import tempfile
import time
from collections.abc import AsyncIterable, Awaitable, Callable
from pathlib import Path

from benchmarks.common import (
    NEW_TOKENS,
    PREFIX_LENGTH,
    arguments,
    load_model,
    prompts,
    random_prefix,
    report,
)
from prefix_store.model_files import find_base_model
from prefix_store.model_loading import LoadedModel
from server.engine.protocol import Engine, EngineConfig, GenerationRequest, SamplingParams
from server.engine.vllm.environment import prepare_environment

CONFIG = EngineConfig(max_slots=64, max_length=256)
Measure = Callable[[], Awaitable[float]]
_round = itertools.count()


def fresh(prompt_ids: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The prompts, begun so that none of them is known from a round before."""
    first = 100 + next(_round)
    return [(first, *ids) for ids in prompt_ids]


async def measured(rounds: int, measures: dict[str, Measure]) -> dict[str, dict[str, float]]:
    """Every measure in turn, after one warm-up."""
    taken: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(rounds + 1):
        for name, measure in measures.items():
            rate = await measure()
            if number:
                taken[name].append(rate)
    return {
        name: {"min": min(xs), "median": statistics.median(xs), "max": max(xs)}
        for name, xs in taken.items()
    }


async def run(loaded: LoadedModel, size: int, new: int, rounds: int, *, lora: bool) -> None:
    """Start the engines, measure, report."""
    from benchmarks.vllm_lora import LoraEngine  # noqa: PLC0415 - these import vLLM
    from server.engine.vllm.arguments import VllmOptions  # noqa: PLC0415
    from server.engine.vllm.engine import VllmEngine  # noqa: PLC0415

    files = find_base_model(
        str(loaded.model.name_or_path),
        device=loaded.device,
        dtype=loaded.dtype,
        cache_dir=Path(),
    )
    engine = VllmEngine(files, CONFIG, VllmOptions())
    ids = prompts(loaded, size)
    for i in range(size):
        await engine.load_prefix(f"task-{i}", random_prefix(loaded, PREFIX_LENGTH, i))
    measures: dict[str, Measure] = {
        "base": lambda: rate(engine, fresh(ids), new, tasks=False),
        "tasks": lambda: rate(engine, fresh(ids), new, tasks=True),
    }
    with tempfile.TemporaryDirectory() as folder:
        other = LoraEngine(loaded, files, CONFIG, Path(folder), size) if lora else None
        if other is not None:
            measures["lora"] = lambda: other.rate(fresh(ids), new)
        rates = await measured(rounds, measures)
        if other is not None:
            other.close()
    await engine.close()
    medians = {name: found["median"] for name, found in rates.items()}
    ratios = {f"vllm_tasks_vs_base_{size}": medians["tasks"] / medians["base"]}
    if lora:
        ratios[f"vllm_tasks_vs_lora_{size}"] = medians["tasks"] / medians["lora"]
    report("vllm_tasks", {"tokens_per_second": rates}, ratios)


async def rate(engine: Engine, ids: list[tuple[int, ...]], new: int, *, tasks: bool) -> float:
    """Generated tokens per second of one batch, each prompt with its own task or with none."""
    started = time.perf_counter()
    sampling = SamplingParams(new, ignore_eos=True)
    requests = [
        GenerationRequest(f"request-{i}", prompt, sampling, f"task-{i}" if tasks else None)
        for i, prompt in enumerate(ids)
    ]
    counts = await asyncio.gather(*(_count(engine.submit(request)) for request in requests))
    return sum(counts) / (time.perf_counter() - started)


async def _count(stream: AsyncIterable[object]) -> int:
    return len([event async for event in stream])


def main() -> None:
    """Run and report."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--no-lora", action="store_true")
    options = parser.parse_args()
    prepare_environment(1)
    size, new = (2, 4) if options.smoke else (options.sequences, NEW_TOKENS)
    rounds = 1 if options.smoke else options.rounds
    asyncio.run(run(load_model(), size, new, rounds, lora=not options.no_lora))


if __name__ == "__main__":
    main()
