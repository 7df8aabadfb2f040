"""`prefixserve plan`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from pydantic import ByteSize, TypeAdapter, ValidationError

from clients import _options as options
from clients._console import print_json
from clients._errors import InvalidArgumentError
from clients.planning.model_size import ModelSize, model_size
from clients.planning.plan import Machine, Plan, Speed, Workload, make_plan
from clients.planning.show import print_plan
from prefix_store.data_dir import DEFAULT_DATA_DIR
from prefix_store.model_loading import DEFAULT_MODEL

_bytes = TypeAdapter(ByteSize)


def _size(text: str) -> int:
    try:
        return int(_bytes.validate_python(text))
    except ValidationError as error:
        raise typer.BadParameter(f"{text!r} is no size such as 24GiB or 512MB") from error


def _size_option(text: str) -> int:
    """An option that takes a size with its unit."""
    size: int = typer.Option(parser=_size, metavar="SIZE", help=text)
    return size


_Model = Annotated[
    str, typer.Option(envvar="PREFIXSERVE_MODEL", help="As of `serve`; only its config is read.")
]
_GpuMemory = Annotated[int | None, _size_option("Memory of a replica's GPU, e.g. 24GiB.")]
_CpuMemory = Annotated[int | None, _size_option("Instead of it: memory of a replica on a CPU.")]
_HostCache = Annotated[
    str, typer.Option(metavar="SIZE", help="Host memory for prefixes, by a GPU.")
]
_Tasks = Annotated[int, typer.Option(min=1, max=10**8, help="Tasks that are registered.")]
_PrefixLength = Annotated[int, typer.Option(min=1, max=10**6, help="Positions of a prefix.")]
_Dtype = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="As of `serve`.")]
_MaxSlots = Annotated[int, typer.Option(min=1, max=4096, help="As of `serve`.")]
_MaxLength = Annotated[int, typer.Option(min=8, max=10**6, help="As of `serve`.")]
_Zipf = Annotated[
    float, typer.Option(min=0, max=3, help="Exponent of the tasks' popularity; 0 is all alike.")
]
_Requests = Annotated[float, typer.Option(min=0.001, max=10**9, help="Of all replicas together.")]
_Tokens = Annotated[int, typer.Option(min=1, max=10**6, help="Of a request, on average.")]
_Versions = Annotated[int, typer.Option(min=1, max=1000, help="Kept of a task, on average.")]
_TokensPerSecond = Annotated[
    float | None,
    typer.Option(min=0.001, help="What one replica generates with its slots full, measured."),
]
_Bandwidth = Annotated[
    int | None, _size_option("Instead: bytes that its memory reads in a second, e.g. 2TB,")
]
_Tflops = Annotated[
    float | None, typer.Option(min=0.001, help="and operations a second, in 10^12.")
]
_DataDir = Annotated[
    Path, typer.Option(envvar="PREFIXSERVE_DATA_DIR", help="Data directory of the server.")
]


def plan(  # noqa: PLR0917 - the command line gives them by name
    tasks: _Tasks,
    model: _Model = DEFAULT_MODEL,
    gpu_memory: _GpuMemory = None,
    cpu_memory: _CpuMemory = None,
    host_cache: _HostCache = "4GiB",
    prefix_length: _PrefixLength = 16,
    dtype: _Dtype = "bfloat16",
    max_slots: _MaxSlots = 64,
    max_length: _MaxLength = 2048,
    zipf: _Zipf = 1.0,
    requests_per_second: _Requests = 1.0,
    prompt_tokens: _Tokens = 64,
    new_tokens: _Tokens = 64,
    versions: _Versions = 1,
    tokens_per_second: _TokensPerSecond = None,
    memory_bandwidth: _Bandwidth = None,
    tflops: _Tflops = None,
    data_dir: _DataDir = DEFAULT_DATA_DIR,
    as_json: options.Json = False,
) -> None:
    """Compute what a model and a workload need: memory, hit rates, replicas, the store."""
    size = model_size(
        model, dtype=getattr(torch, dtype), cache_dir=data_dir.expanduser() / "models"
    )
    machine = Machine(
        device="cpu" if gpu_memory is None else "cuda",
        memory_bytes=_memory(gpu_memory, cpu_memory),
        max_slots=max_slots,
        max_length=min(max_length, size.max_positions),
        host_cache_bytes=0 if gpu_memory is None else _size(host_cache),
    )
    workload = Workload(
        tasks=tasks,
        prefix_length=prefix_length,
        zipf=zipf,
        requests_per_second=requests_per_second,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        versions=versions,
    )
    flops = None if tflops is None else tflops * 10**12
    speed = _speed(tokens_per_second, memory_bandwidth, flops)
    found = make_plan(size, machine, workload, speed)
    _check_fits(size, machine, workload, found)
    print_json(asdict(found)) if as_json else print_plan(found, machine, workload)


def _memory(gpu: int | None, cpu: int | None) -> int:
    given = [size for size in (gpu, cpu) if size is not None]
    if len(given) != 1:
        raise typer.BadParameter("give one of --gpu-memory and --cpu-memory")
    return given[0]


def _speed(measured: float | None, bandwidth: int | None, flops: float | None) -> Speed:
    if measured is None and (bandwidth is None or flops is None):
        raise typer.BadParameter(
            "give --tokens-per-second, measured (for SmolLM2 by `python -m benchmarks.engine`), or "
            "--memory-bandwidth and --tflops of the data sheet, to estimate it"
        )
    return Speed(measured, bandwidth, flops)


def _check_fits(size: ModelSize, machine: Machine, workload: Workload, plan: Plan) -> None:
    """Refuse a plan that no server could run.

    Raises:
        InvalidArgumentError: a request is over the slots' length, or the memory is too small.
    """
    positions = workload.prefix_length + workload.prompt_tokens + workload.new_tokens
    if positions > machine.max_length:
        raise InvalidArgumentError(
            f"prefix, prompt and new tokens are {positions} positions, and a slot has "
            f"{machine.max_length}; raise --max-length, to {size.max_positions} at most"
        )
    if plan.resident == 0:
        missing = plan.prefix_bytes - plan.memory.prefixes
        raise InvalidArgumentError(
            f"{missing / 1e9:.2f} GB are missing for a single prefix: a slot takes "
            f"{plan.memory.slots / machine.max_slots / 1e9:.3f} GB and the weights take "
            f"{plan.memory.weights / 1e9:.2f} GB of {plan.memory.total / 1e9:.2f}; lower "
            "--max-slots or --max-length, or take a machine with more memory"
        )
