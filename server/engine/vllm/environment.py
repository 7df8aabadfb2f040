"""What vLLM reads from the environment, partly as it is imported."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.resource_tracker import ensure_running


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


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Processes that are started meanwhile, and theirs, never hear of Ctrl-C.

    A terminal tells it to all of them; this one ends the others, once their requests are finished.
    """
    ensure_running()  # it would let this process, and those to come, hear again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def cores_of_ranks(cores: Sequence[int], ranks: int) -> str:
    """The cores of each rank's threads on a CPU, as vLLM reads them."""
    own = len(cores) // ranks
    if own == 0:
        return "nobind"
    parts = (cores[rank * own : (rank + 1) * own] for rank in range(ranks))
    return "|".join(",".join(map(str, part)) for part in parts)
