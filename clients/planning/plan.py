"""From a model, a machine and a workload to memory, hit rates, replicas and the store's size.

Every figure is a sum or a product that docs/scaling.md writes down; bytes and seconds throughout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from clients.planning.hit_rate import lru_hit_rate, zipf
from clients.planning.model_size import ModelSize

Device = Literal["cuda", "cpu"]

RUNTIME_BYTES: dict[Device, int] = {"cpu": 520 * 10**6, "cuda": 10**9}
"""Python, torch and what else is there before a model; measured on a CPU, assumed of CUDA."""

WEIGHT_COPIES: dict[Device, int] = {"cpu": 2, "cuda": 1}
"""On a CPU the weights as loaded, and packed for the kernels."""

HEADROOM = 0.1
"""Share of the memory that nothing is planned into: a step's activations, fragmentation."""

UTILISATION = 0.8
"""Share of a replica's throughput that is planned for; queues grow without bound at 1."""

EFFICIENCY = 0.5
"""Share of a machine's peak that a step reaches, where speed is estimated and not measured."""

TASK_BYTES = 1_600
"""What the store keeps of a task beside its keys and values: names, shapes, counts."""


@dataclass(frozen=True, slots=True)
class Machine:
    """One replica.

    Attributes:
        memory_bytes: the GPU's, or on a CPU what the process may take.
        host_cache_bytes: host memory for prefixes beside a GPU.
        max_slots, max_length: as the server's settings.
    """

    device: Device
    memory_bytes: int
    max_slots: int
    max_length: int
    host_cache_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked.

    Attributes:
        zipf: exponent of the tasks' popularity.
        prompt_tokens, new_tokens: of a request, on average.
        versions: kept of each task, on average.
    """

    tasks: int
    prefix_length: int
    zipf: float
    requests_per_second: float
    prompt_tokens: int
    new_tokens: int
    versions: int = 1


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast one replica is.

    Attributes:
        tokens_per_second: generated with every slot in use, measured; None to estimate it.
        memory_bandwidth: bytes per second, of the data sheet.
        flops: operations per second in the model's dtype, of the data sheet.
    """

    tokens_per_second: float | None = None
    memory_bandwidth: float | None = None
    flops: float | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """Where one replica's memory goes; negative `prefixes` where it does not suffice."""

    total: int
    headroom: int
    runtime: int
    weights: int
    slots: int
    prefixes: int


@dataclass(frozen=True, slots=True)
class HitRates:
    """Share of requests whose prefix is on the device, and on the device or in host memory."""

    device: float
    host: float


@dataclass(frozen=True, slots=True)
class Store:
    """What the store holds and sends.

    Attributes:
        loads_per_second, bytes_per_second: by all replicas together, tasks hashed to them.
        bytes_per_second_round_robin: where requests go to any replica.
    """

    bytes: int
    loads_per_second: float
    bytes_per_second: float
    bytes_per_second_round_robin: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What a deployment needs.

    Attributes:
        prefix_bytes: one prefix on the device.
        resident: prefixes that one replica's device has room for.
        tokens_per_second: of one replica; `estimated` where it was not measured.
        hashed, round_robin: hit rates where a task always goes to the same replica, and where its
            requests go to any.
    """

    model: ModelSize
    memory: Memory
    prefix_bytes: int
    resident: int
    tokens_per_second: float
    estimated: bool
    replicas: int
    hashed: HitRates
    round_robin: HitRates
    store: Store


def make_plan(model: ModelSize, machine: Machine, workload: Workload, speed: Speed) -> Plan:
    """Compute everything.

    Raises:
        ValueError: the speed is neither given nor can be estimated.
    """
    memory = replica_memory(model, machine)
    prefix_bytes = workload.prefix_length * model.prefix_position_bytes
    resident = max(0, memory.prefixes) // prefix_bytes
    near = max(resident, machine.host_cache_bytes // prefix_bytes)
    rate, estimated = speed.tokens_per_second, speed.tokens_per_second is None
    if rate is None:
        rate = estimated_tokens_per_second(model, machine, workload, speed)
    replicas = replicas_for(workload, rate)
    shares = zipf(workload.tasks, workload.zipf)

    def hit_rates(copies: int) -> HitRates:
        device, host = (lru_hit_rate(shares, copies * room) for room in (resident, near))
        return HitRates(device, host)

    # Each replica has its own tasks, so that all their room is one cache; or all have the same.
    hashed, round_robin = hit_rates(replicas), hit_rates(1)
    stored = prefix_bytes + TASK_BYTES
    loads = workload.requests_per_second * (1 - hashed.host)
    return Plan(
        model=model,
        memory=memory,
        prefix_bytes=prefix_bytes,
        resident=resident,
        tokens_per_second=rate,
        estimated=estimated,
        replicas=replicas,
        hashed=hashed,
        round_robin=round_robin,
        store=Store(
            bytes=workload.tasks * workload.versions * stored,
            loads_per_second=loads,
            bytes_per_second=loads * stored,
            bytes_per_second_round_robin=workload.requests_per_second
            * (1 - round_robin.host)
            * stored,
        ),
    )


def replica_memory(model: ModelSize, machine: Machine) -> Memory:
    """Share out one replica's memory; what the rest leaves is for prefixes."""
    headroom = int(HEADROOM * machine.memory_bytes)
    runtime = RUNTIME_BYTES[machine.device]
    weights = WEIGHT_COPIES[machine.device] * model.weight_bytes
    slots = machine.max_slots * machine.max_length * model.position_bytes
    return Memory(
        total=machine.memory_bytes,
        headroom=headroom,
        runtime=runtime,
        weights=weights,
        slots=slots,
        prefixes=machine.memory_bytes - headroom - runtime - weights - slots,
    )


def estimated_tokens_per_second(
    model: ModelSize, machine: Machine, workload: Workload, speed: Speed
) -> float:
    """Tokens of one replica with every slot in use, by the roofline of a step.

    A step reads the weights and every slot's keys and values once, and multiplies each weight with
    each of its rows: a token of every slot, and the prompts of the requests that take the places of
    those that end. Williams, Waterman & Patterson 2009, "Roofline".

    Raises:
        ValueError: the machine's bandwidth or arithmetic is not given.
    """
    if speed.memory_bandwidth is None or speed.flops is None:
        raise ValueError("estimating a speed takes the memory's bandwidth and the arithmetic's")
    context = workload.prefix_length + workload.prompt_tokens + workload.new_tokens / 2
    read = model.weight_bytes + machine.max_slots * context * model.position_bytes
    rows = machine.max_slots * (1 + workload.prompt_tokens / workload.new_tokens)
    seconds = max(read / speed.memory_bandwidth, 2 * model.parameters * rows / speed.flops)
    return EFFICIENCY * machine.max_slots / seconds


def replicas_for(workload: Workload, tokens_per_second: float) -> int:
    """Replicas that generate what is asked for, at most `UTILISATION` busy."""
    asked = workload.requests_per_second * workload.new_tokens
    return max(1, math.ceil(asked / (UTILISATION * tokens_per_second)))
