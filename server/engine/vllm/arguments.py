"""How vLLM is started: this project's sizes in its words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs

from prefix_store.model_files import ModelFiles
from server.engine.checks import prefix_numbers
from server.engine.protocol import EngineConfig


@dataclass(frozen=True, slots=True)
class VllmOptions:
    """What vLLM is given as it is, by its own names.

    Attributes:
        kv_cache_memory_bytes: memory for running sequences; None for what
            `gpu_memory_utilization` leaves, or on a CPU for what all slots can need.
        block_size: positions that it gives out at once; None for its own choice.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    block_size: int | None = None


def engine_arguments(
    files: ModelFiles, config: EngineConfig, options: VllmOptions, folder: Path
) -> AsyncEngineArgs:
    """vLLM's own description of the engine.

    Args:
        config: its `max_length` is at most the model's.
        folder: where the connector finds prefixes and writes what it captures.
    """
    on_cpu = files.device.type == "cpu"
    memory = options.kv_cache_memory_bytes
    if memory is None and on_cpu:
        numbers = prefix_numbers(files.spec, config.max_length, files.spec.groups)
        memory = config.max_slots * numbers * files.dtype.itemsize
    step_tokens = config.max_slots + config.prefill_tokens
    extra = {"prefix_folder": str(folder), "capture_folder": str(folder)}
    return AsyncEngineArgs(
        model=str(files.folder),
        skip_tokenizer_init=True,
        dtype=str(files.dtype).removeprefix("torch."),
        max_model_len=config.max_length,
        max_num_seqs=config.max_slots,
        # Each running sequence's token of a step, and a part of the waiting prompts; on a CPU whole
        # ones, for vLLM ends when it computes a part of a request's that has a seed there: it turns
        # the generator back, which those of a CPU cannot do.
        enable_chunked_prefill=not on_cpu,
        max_num_batched_tokens=max(step_tokens, config.max_length) if on_cpu else step_tokens,
        enforce_eager=not config.cuda_graphs and not on_cpu,
        scheduling_policy="priority",
        enable_prefix_caching=True,
        enable_prompt_embeds=True,
        tensor_parallel_size=options.tensor_parallel_size,
        pipeline_parallel_size=options.pipeline_parallel_size,
        gpu_memory_utilization=options.gpu_memory_utilization,
        kv_cache_memory_bytes=memory,
        block_size=options.block_size,
        kv_transfer_config=KVTransferConfig(
            kv_connector="PrefixConnector",
            kv_connector_module_path="server.engine.vllm.connector",
            kv_role="kv_both",
            # A prefix that cannot be had must not be computed from the tokens in its place.
            kv_load_failure_policy="fail",
            kv_connector_extra_config=extra,
        ),
        disable_log_stats=True,
        enable_log_requests=False,
    )
