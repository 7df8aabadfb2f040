"""What vLLM reads from the environment, partly as it is imported."""

from __future__ import annotations

import os
from collections.abc import Sequence


def prepare_environment(ranks: int) -> None:
    """Set it where the operator has not; call this before vLLM is imported.

    Args:
        ranks: processes that share the work.
    """
    for name, value in {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        # This process has threads, which a fork would leave behind half way.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        # vLLM would leave a core for the server, which needs a small part of one.
        "VLLM_CPU_OMP_THREADS_BIND": cores_of_ranks(sorted(os.sched_getaffinity(0)), ranks),
    }.items():
        os.environ.setdefault(name, value)


def cores_of_ranks(cores: Sequence[int], ranks: int) -> str:
    """The cores of each rank's threads on a CPU, as vLLM reads them."""
    own = len(cores) // ranks
    if own == 0:
        return "nobind"
    parts = (cores[rank * own : (rank + 1) * own] for rank in range(ranks))
    return "|".join(",".join(map(str, part)) for part in parts)
