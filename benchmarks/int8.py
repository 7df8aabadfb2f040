"""What int8 weights cost in quality: the E2E demo task with them and without.

    python -m benchmarks.int8

Every row of the E2E development set, greedy: BLEU against all references (sacrebleu), and the mean
log-probability, in nats, of the tokens of each row's first reference.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch

from benchmarks.common import DATA, arguments, load_model, report
from clients.data import Row, detokenise, read_rows
from clients.evaluation import Output, score_outputs
from clients.training.examples import encode_rows
from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix
from server.demo_tasks import DEMO_TASKS
from server.engine.choose_runner import choose_runner
from server.engine.core import EngineCore
from server.engine.protocol import EngineConfig, GenerationRequest, SamplingParams, TokenEvent
from server.engine.runner import Runner
from server.engine.scheduler import Span
from server.engine.sequence import Sequence
from server.engine.special_tokens import SpecialTokens

SLOTS, MAX_LENGTH, NEW_TOKENS = 64, 512, 128


@dataclass(frozen=True, slots=True)
class Example:
    """A row as token ids."""

    row: Row
    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]


def outputs(
    loaded: LoadedModel, runner: Runner, prefix: Prefix, examples: Items[Example]
) -> list[str]:
    """Greedy texts."""
    core = EngineCore(runner, EngineConfig(max_slots=SLOTS), SpecialTokens.of(loaded))
    tokens: list[list[int]] = [[] for _ in examples]
    for i, example in enumerate(examples):
        request = GenerationRequest(str(i), example.prompt_ids, SamplingParams(NEW_TOKENS))
        core.add(Sequence(request, prefix))
    while core.has_work:
        for request_id, event in core.step().events:
            assert isinstance(event, TokenEvent), event  # noqa: S101 - nothing is cancelled here
            tokens[int(request_id)].append(event.chosen.token_id)
    texts = loaded.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [detokenise(text) for text in texts]


@torch.inference_mode()
def log_probabilities(runner: Runner, prefix: Prefix, examples: Items[Example]) -> list[float]:
    """Of every target token of at most `SLOTS` examples, given those before it."""
    found: list[float] = []
    sequences = [
        Sequence(GenerationRequest(str(slot), e.prompt_ids, SamplingParams(1)), prefix, slot=slot)
        for slot, e in enumerate(examples)
    ]
    running = []
    for sequence, example in zip(sequences, examples, strict=True):
        runner.start(sequence)
        running.append((sequence, sequence.prefix_length, example.prompt_ids, example.target_ids))
    while running:
        logits = runner.forward([Span(s, start, ids) for s, start, ids, _ in running])
        scores = logits.float().log_softmax(-1)
        found += [float(scores[i, left[0]]) for i, (*_, left) in enumerate(running)]
        running = [
            (sequence, start + len(ids), left[:1], left[1:])
            for sequence, start, ids, left in running
            if len(left) > 1
        ]
    return found


def quality(
    loaded: LoadedModel, runner: Runner, prefix: Prefix, examples: Items[Example]
) -> dict[str, float]:
    """BLEU, mean log-probability, and how long it took."""
    started = time.perf_counter()
    scores: list[float] = []
    for first in range(0, len(examples), SLOTS):
        scores += log_probabilities(runner, prefix, examples[first : first + SLOTS])
    texts = outputs(loaded, runner, prefix, examples)
    rows = [example.row for example in examples]
    [bleu] = score_outputs("int8", rows, list(map(Output, texts)), metrics=["BLEU"]).scores
    return {
        "bleu": bleu.value or 0.0,
        "mean_log_probability": sum(scores) / len(scores),
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    """Run and report."""
    options = arguments(__doc__ or "").parse_args()
    loaded = load_model()
    task = next(task for task in DEMO_TASKS if task.task_id == "e2e")
    prefix = Prefix.from_bytes(task.path.read_bytes()).to(loaded.model.device, loaded.model.dtype)
    rows = [
        Row(row.source, tuple(map(detokenise, row.references)))
        for row in read_rows(DATA / "e2e" / "dev.jsonl")[: 3 if options.smoke else None]
    ]
    encoded = encode_rows(rows, loaded, prefix.template, MAX_LENGTH, every_reference=False).examples
    examples = [
        Example(row, ids.prompt_ids, ids.target_ids) for row, ids in zip(rows, encoded, strict=True)
    ]
    results = {
        name: quality(loaded, choose_runner(loaded, SLOTS, MAX_LENGTH, int8=int8), prefix, examples)
        for name, int8 in (("bfloat16", False), ("int8", True))
    }
    if not options.json:
        for name, found in results.items():
            print(name, ", ".join(f"{key} {value:.3f}" for key, value in found.items()))
    report("int8", results, {"int8_bleu": results["int8"]["bleu"] / results["bfloat16"]["bleu"]})


if __name__ == "__main__":
    main()
