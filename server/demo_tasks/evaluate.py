"""Measure a prefix on held-out rows: loss and BLEU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix
from server.demo_tasks.data import Row, detokenise, encode, prompt_ids
from server.demo_tasks.prefix_model import greedy_texts, target_loss

_BATCH_SIZE = 32
_MAX_NEW_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Scores:
    """What a prefix reaches.

    Attributes:
        loss: mean cross-entropy over the target tokens of each row's first reference, nats.
        bleu: sacrebleu's corpus BLEU (13a, mixed case) of greedy outputs against all references.
        outputs: the greedy outputs, in the order of the rows.
    """

    loss: float
    bleu: float
    outputs: tuple[str, ...]


def evaluate(base: LoadedModel, prefix: Prefix, rows: Sequence[Row]) -> Scores:
    """Score `prefix` on `rows`. BLEU needs `pip install sacrebleu`."""
    outputs = generate_all(base, prefix, [row.source for row in rows])
    return Scores(dev_loss(base, prefix, rows), bleu(outputs, rows), outputs)


def generate_all(base: LoadedModel, prefix: Prefix, sources: Sequence[str]) -> tuple[str, ...]:
    """Greedy outputs for `sources`, in their order."""
    prompts = [prompt_ids(base.tokenizer, prefix.template, source) for source in sources]
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    outputs = [""] * len(prompts)
    for start in range(0, len(by_length), _BATCH_SIZE):
        indices = by_length[start : start + _BATCH_SIZE]
        chosen = [prompts[index] for index in indices]
        texts = greedy_texts(base, prefix.keys, prefix.values, chosen, _MAX_NEW_TOKENS)
        for index, text in zip(indices, texts, strict=True):
            outputs[index] = detokenise(text)
    return tuple(outputs)


@torch.inference_mode()
def dev_loss(base: LoadedModel, prefix: Prefix, rows: Sequence[Row]) -> float:
    """Mean cross-entropy over the target tokens of each row's first reference, nats."""
    examples = sorted(
        (encode(base.tokenizer, prefix.template, r.source, r.references[0]) for r in rows), key=len
    )
    total, tokens = 0.0, 0
    for start in range(0, len(examples), _BATCH_SIZE):
        batch = examples[start : start + _BATCH_SIZE]
        count = sum(len(example.target_ids) for example in batch)
        total += count * target_loss(base.model, prefix.keys, prefix.values, batch).item()
        tokens += count
    return total / tokens


def bleu(outputs: Sequence[str], rows: Sequence[Row]) -> float:
    """Corpus BLEU against however many references each row has."""
    from sacrebleu import corpus_bleu  # noqa: PLC0415 - needed to train, never to serve

    most = max(len(row.references) for row in rows)
    # sacrebleu wants equally many references for each row and skips None, which its types forget.
    columns = [
        [row.references[i] if i < len(row.references) else None for row in rows]
        for i in range(most)
    ]
    return float(corpus_bleu(list(outputs), columns).score)  # type: ignore[arg-type]
