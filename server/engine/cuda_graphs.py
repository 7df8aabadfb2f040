"""CUDA graphs: a step's kernels, launched at once.

This follows torch's documentation ("CUDA semantics", CUDA Graphs); it has not been run on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from server.engine.static_decode import Step

_WARM_UPS = 2


class CudaGraphs:
    """Captures steps; their graphs share one pool of memory, since one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        """A step that replays the kernels of this one.

        Raises:
            RuntimeError: the step waits for the device, or does what a graph cannot hold.
        """
        with torch.cuda.device(self._device):  # streams are made on the current one
            return self._captured(step)

    def _captured(self, step: Step) -> Step:
        # The first calls choose algorithms and reserve workspaces, which must not be captured.
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile: prefixes are copied beside the model's work.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = step()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay
