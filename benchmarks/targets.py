"""What each ratio is meant to reach on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Target:
    """A bound of a measure; `at_most` where less is better."""

    value: float
    at_most: bool = False

    def score(self, measured: float) -> float:
        """1 where the target is just met, more where it is exceeded."""
        return self.value / measured if self.at_most else measured / self.value


TARGETS: Mapping[str, Target] = {
    "vs_vllm_base_1": Target(1.2),
    "vs_vllm_base_8": Target(1.2),
    "vs_vllm_base_32": Target(1.5),
    "vs_vllm_base_64": Target(1.5),
    "vs_vllm_lora_32": Target(4.5),
    "vs_peft_32": Target(10),
    "vs_matmul_32": Target(0.70),
    "mixed_vs_single_32": Target(0.98),
    "prefix_vs_none_32": Target(0.95),
    "http_vs_engine_32": Target(0.90),
    "tasks_10000_vs_1": Target(0.95),
    "cold_ttft_added_p99_ms": Target(15, at_most=True),
    "cold_itl_ratio_p99": Target(1.2, at_most=True),
    "shared_prefix_memory": Target(0.1, at_most=True),
    "shared_prefix_speed": Target(1.3),
    "plain_beside_structured_1": Target(0.97),
    "plain_beside_structured_8": Target(0.97),
    "fairness_queue_p99": Target(2.0, at_most=True),
}
