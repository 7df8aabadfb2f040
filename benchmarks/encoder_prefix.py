"""What a prefix in the encoder is worth, on a tiny BART.

    python -m benchmarks.encoder_prefix

The base learns four tasks at once: to copy, reverse, sort or shift symbols, as the first word of
the source says. Then it is frozen and gets sources without that word. Prefixes of eight vectors,
all in the decoder or half of them in the encoder, learn one task each. Keeps
`benchmarks/results/encoder_prefix.json` and draws `docs/images/encoder-prefix.png`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast
from transformers.trainer_utils import get_last_checkpoint

from benchmarks.common import ROOT
from clients.data import Row
from clients.training import TrainSettings, train
from prefix_store.base_model import BaseModelSpec
from prefix_store.groups import DECODER, ENCODER, Group
from prefix_store.model_loading import LoadedModel
from prefix_store.prefix_attention import use_prefix_attention

KEPT = ROOT / "benchmarks" / "results" / "encoder_prefix.json"
PLOT = ROOT / "docs" / "images" / "encoder-prefix.png"
VECTORS = 8
WHERE: dict[str, tuple[Group, ...]] = {
    "8 in the decoder": (DECODER,),
    "4 in the encoder, 4 in the decoder": (ENCODER, DECODER),
}
Symbols = list[int]
NUM_SYMBOLS = 16
TASKS: dict[str, Callable[[Symbols], Symbols]] = {
    "copy": lambda symbols: symbols,
    "reverse": lambda symbols: symbols[::-1],
    "sort": sorted,
    "shift": lambda symbols: [(symbol + 1) % NUM_SYMBOLS for symbol in symbols],
}
_LENGTH, _LENGTHS = 6, (3, 16)
_BASE_STEPS, _BASE_ROWS, _BASE_RATE = 1000, 64, 2e-3
_STEPS = 300


def _words(symbols: Sequence[int]) -> str:
    return " ".join(f"s{symbol}" for symbol in symbols)


def _tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "</s>", "<unk>", *TASKS, *(f"s{i}" for i in range(NUM_SYMBOLS))]
    vocab = {word: token_id for token_id, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))  # noqa: S106 - no password
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocab["</s>"])]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        pad_token="<pad>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
    )


def make_base(steps: int = _BASE_STEPS) -> LoadedModel:
    """A tiny BART that does the task which the source's first word names, trained from scratch."""
    torch.manual_seed(1)
    draw = random.Random(1)  # noqa: S311 - not cryptography
    tokenizer = _tokenizer()
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=None,
        dropout=0.0,
        init_std=0.05,
    )
    model = BartForConditionalGeneration(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_BASE_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 50) * (1 - step / steps)
    )
    for _ in range(steps):
        length = draw.randint(*_LENGTHS)
        rows = [_drawn(draw, draw.choice(list(TASKS)), length) for _ in range(_BASE_ROWS)]
        sources = tokenizer([f"{task} {_words(symbols)}" for task, symbols, _ in rows])
        targets = tokenizer([_words(target) for _, _, target in rows])
        loss = model(
            input_ids=torch.tensor(sources["input_ids"]),
            labels=torch.tensor(targets["input_ids"]),
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.requires_grad_(False).train(False)
    spec = BaseModelSpec.from_model(model, "tiny-bart")
    use_prefix_attention(model, spec)
    return LoadedModel(model, tokenizer, spec)


def _drawn(draw: random.Random, task: str, length: int) -> tuple[str, Symbols, Symbols]:
    symbols = [draw.randrange(NUM_SYMBOLS) for _ in range(length)]
    return task, symbols, TASKS[task](symbols)


def rows_of(task: str, count: int, seed: int) -> list[Row]:
    """Sources that do not say what to do with them."""
    draw = random.Random(seed)  # noqa: S311 - not cryptography
    drawn = [_drawn(draw, task, _LENGTH) for _ in range(count)]
    return [Row(_words(symbols), (_words(target),)) for _, symbols, target in drawn]


def dev_losses(
    base: LoadedModel, task: str, where: Sequence[Group], steps: int = _STEPS
) -> list[tuple[int, float]]:
    """Steps, and the dev loss after them, of a prefix of `VECTORS` vectors in all."""
    settings = TrainSettings(
        where=tuple(where),
        prefix_length=VECTORS // len(where),
        init="random",
        template="{source}",
        max_steps=steps,
        eval_steps=max(1, steps // 6),
        batch_size=32,
        learning_rate=5e-3,
        patience=0,
        dtype="float32",
    )
    with TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        rows, dev = rows_of(task, 4000, seed=5), rows_of(task, 200, seed=6)
        train(settings, base, rows, output, dev=dev, console=Console(quiet=True))
        checkpoint = Path(get_last_checkpoint(output))  # type: ignore[no-untyped-call]
        state = json.loads((checkpoint / "trainer_state.json").read_text())
    return [
        (entry["step"], entry["eval_dev_loss"])
        for entry in state["log_history"]
        if "eval_dev_loss" in entry
    ]


def draw_plot(results: dict[str, Any], path: Path) -> None:
    """The dev losses, a panel for each task."""
    figure, panels = plt.subplots(1, len(TASKS), figsize=(11, 3), sharey=True)
    for panel, task in zip(panels, TASKS, strict=True):
        for name in WHERE:
            panel.plot(*zip(*results[task][name], strict=True), marker="o", label=name)
        panel.set(title=task, xlabel="steps", yscale="log")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("dev loss, nats a token")
    panels[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Measure, keep and draw."""
    base = make_base()
    results = {
        task: {name: dev_losses(base, task, where) for name, where in WHERE.items()}
        for task in TASKS
    }
    for task, losses in results.items():
        print(task, {name: round(found[-1][1], 4) for name, found in losses.items()})
    KEPT.write_text(json.dumps(results, indent=1) + "\n")
    draw_plot(results, PLOT)


if __name__ == "__main__":
    main()
