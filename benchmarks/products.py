"""A step's matrix products and nothing else: what a step cannot do without.

Projections that share an input are one product. `onednn_step` computes them with oneDNN on weights
in its own packed layout, the fastest that a library offers for these sizes; `own_step` with the
engine's kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from prefix_store.model_loading import LoadedModel
from server.engine.kernels import kernels_for
from server.engine.packed_matrix import project
from server.engine.packed_model import PackedModel

Step = Callable[[], None]


def onednn_step(loaded: LoadedModel, rows: int) -> Step:
    """Every product of a step of `rows` rows, by oneDNN."""
    product = torch.ops.mkldnn._linear_pointwise.default
    packed = []
    for weight in _fused_weights(loaded):
        x = torch.randn(rows, weight.shape[1]).to(weight.dtype)
        packed.append((x, torch.ops.mkldnn._reorder_linear_weight(weight)))

    def step() -> None:
        for x, weight in packed:
            product(x, weight, None, "none", [], "")

    return step


def own_step(model: PackedModel, rows: int) -> Step:
    """Every product of a step of `rows` rows, by the engine's kernels."""
    kernels = kernels_for(model.embedding.dtype)
    assert kernels is not None  # noqa: S101 - there is a packed model, so there are kernels
    matrices = [m for la in model.layers for m in (la.qkv, la.output, la.gate_up, la.down)]
    inputs = [
        (matrix, torch.randn(rows, matrix.depth).to(model.embedding.dtype))
        for matrix in (*matrices, model.head)
    ]
    threads = torch.get_num_threads()

    def step() -> None:
        for matrix, x in inputs:
            project(kernels.project, matrix, x, threads)

    return step


def _fused_weights(loaded: LoadedModel) -> list[torch.Tensor]:
    model: Any = loaded.model
    weights = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        weights += [
            torch.cat([p.weight for p in (attention.q_proj, attention.k_proj, attention.v_proj)]),
            attention.o_proj.weight,
            torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
            mlp.down_proj.weight,
        ]
    return [weight.detach() for weight in (*weights, model.get_output_embeddings().weight)]
