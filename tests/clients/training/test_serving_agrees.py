"""A prefix has the loss that the trainer says where it is served, too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clients.data import Row
from clients.training import TrainSettings, train
from clients.training.examples import encode_rows
from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix
from server.engine.choose_runner import choose_runner
from server.engine.protocol import GenerationRequest, SamplingParams
from server.engine.runner import Span
from server.engine.sequence import Sequence

ROWS = [
    Row("name : Cotto | food : Thai", ("Cotto serves Thai food.",)),
    Row("name : Aromi", ("Aromi is a place to eat, near the river.",)),
    Row("name : Zizzi | area : riverside", ("Zizzi is in the riverside area.",)),
]


@torch.inference_mode()
def engine_loss(loaded: LoadedModel, prefix: Prefix, rows: list[Row]) -> float:
    """Mean cross-entropy of the targets' tokens, which the engine gets one by one."""
    runner = choose_runner(loaded, len(rows), 128)
    examples = encode_rows(rows, loaded, prefix.template, 100).examples
    losses: list[float] = []
    for slot, example in enumerate(examples):
        request = GenerationRequest(str(slot), example.prompt_ids, SamplingParams(1))
        sequence = Sequence(request, prefix, slot=slot)
        runner.start(sequence)
        start, ids = sequence.prefix_length, example.prompt_ids
        for target in example.target_ids:
            logits = runner.forward([Span(sequence, start, ids)])
            losses.append(-float(logits.float().log_softmax(-1)[0, target]))
            start, ids = start + len(ids), (target,)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("method", ["prefix", "direct"])
def test_dev_loss_is_the_engines(method: str, smollm2: LoadedModel, tmp_path: Path) -> None:
    settings = TrainSettings.model_validate(
        {"method": method, "max_steps": 2, "batch_size": 2, "prefix_length": 5}
    )
    trained = train(settings, smollm2, ROWS, tmp_path / "run", dev=ROWS)
    assert trained.prefix is not None
    assert trained.dev_loss == pytest.approx(engine_loss(smollm2, trained.prefix, ROWS), abs=1e-3)
