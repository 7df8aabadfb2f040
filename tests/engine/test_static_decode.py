"""Shapes that decode steps are captured in, and what happens where they cannot be."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from prefix_store.model_loading import LoadedModel
from server.engine.kv_cache import Window
from server.engine.runner import TransformersRunner
from server.engine.static_decode import StaticDecode, Step, buckets

SCRATCH = 1000


@pytest.mark.parametrize(
    ("smallest", "largest", "expected"),
    [(1, 1, (1,)), (1, 6, (1, 2, 4, 6)), (1, 8, (1, 2, 4, 8)), (256, 900, (256, 512, 900))],
)
def test_buckets_double_up_to_the_largest(
    smallest: int, largest: int, expected: tuple[int, ...]
) -> None:
    assert buckets(smallest, largest) == expected


def test_a_step_takes_the_next_larger_shape_and_pads_with_scratch() -> None:
    seen: list[tuple[list[list[int]], Window]] = []

    def forward(ids: Tensor, positions: Tensor, window: Window) -> Tensor:
        columns = torch.cat([ids, positions, window.write_at], dim=1)
        seen.append((columns.tolist(), window))
        return ids.float()

    decode = StaticDecode(
        forward,
        max_slots=6,
        max_length=900,
        scratch=SCRATCH,
        device=torch.device("cpu"),
        capture=lambda step: step,
    )
    assert decode.shapes == {(rows, n) for rows in (1, 2, 4, 6) for n in (256, 512, 900)}
    logits = decode([2, 0], [7, 8], [300, 5])
    columns, window = seen.pop()
    assert logits[:, 0].tolist() == [7, 8]
    assert columns == [[8, 5, 5], [0, 0, SCRATCH], [7, 300, 300], [0, 0, SCRATCH]]
    assert (window.rows, window.length) == (slice(0, 4), 512)

    decode([0], [9], [255])
    columns, window = seen.pop()
    assert columns == [[9, 255, 255]]
    assert (window.rows, window.length) == (slice(0, 1), 256)


def test_a_model_that_cannot_be_captured_is_served_without(
    tiny_llama: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(_: Step) -> Step:
        raise RuntimeError("operation not permitted when stream is capturing")

    with caplog.at_level(logging.WARNING):
        runner = TransformersRunner(tiny_llama, 3, 80, capture=refused)
    assert "not permitted when stream is capturing" in caplog.text
    assert runner._static is None
