"""vLLM's own way to many tasks: a LoRA adapter for each."""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM

from benchmarks.peers.weights import LORA_RANK, write_lora_adapters
from prefix_store.model_files import ModelFiles
from prefix_store.model_loading import LoadedModel
from server.engine.protocol import EngineConfig
from server.engine.vllm.arguments import VllmOptions, engine_arguments


class LoraEngine:
    """The same `AsyncLLM` as the engine's, with adapters in place of the connector."""

    def __init__(
        self, loaded: LoadedModel, files: ModelFiles, config: EngineConfig, folder: Path, count: int
    ) -> None:
        write_lora_adapters(loaded, folder, count)
        self._adapters = [
            LoRARequest(path.name, number, str(path))
            for number, path in enumerate(sorted(folder.iterdir()), 1)
        ]
        common: Any = engine_arguments(files, config, VllmOptions(), folder)
        self._llm = AsyncLLM.from_engine_args(
            replace(
                common,
                kv_transfer_config=None,
                enable_prompt_embeds=False,
                enable_lora=True,
                max_loras=count,
                max_lora_rank=LORA_RANK,
            )
        )

    async def rate(self, prompt_ids: list[tuple[int, ...]], new: int) -> float:
        """Generated tokens per second of one batch, each prompt with its own adapter."""
        started = time.perf_counter()
        sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)

        async def ask(ids: tuple[int, ...], adapter: LoRARequest) -> int:
            prompt, name = {"prompt_token_ids": list(ids)}, uuid.uuid4().hex
            tokens = 0
            async for output in self._llm.generate(prompt, sampling, name, lora_request=adapter):
                tokens = len(output.outputs[0].token_ids)
            return tokens

        counts = await asyncio.gather(*map(ask, prompt_ids, self._adapters))
        return sum(counts) / (time.perf_counter() - started)

    def close(self) -> None:
        """End its processes."""
        self._llm.shutdown()
