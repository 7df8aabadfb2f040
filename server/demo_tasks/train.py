"""Train a demo task's prefix: `python -m server.demo_tasks.train e2e --data DATA`.

Prefix-tuning (Li & Liang 2021) with the keys and values themselves as parameters, which start as
those of a real text. The base model is frozen.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from prefix_store.model_loading import (
    DEFAULT_MODEL,
    LoadedModel,
    default_dtype,
    load_base_model,
)
from prefix_store.prefix import Prefix
from server.demo_tasks.data import Example, Row, encode, endless_batches, read_rows, sha256_of
from server.demo_tasks.evaluate import evaluate
from server.demo_tasks.prefix_model import target_loss, text_keys_values

_SAVE_EVERY = 50
_SAMPLES = 5


@dataclass(frozen=True, slots=True)
class Recipe:
    """What differs between tasks.

    Attributes:
        template: text around the source, `{source}` where it goes.
        initial_text: its keys and values are where training starts; its length in tokens is the
            prefix length.
    """

    template: str
    initial_text: str


RECIPES = {
    "e2e": Recipe(
        template="{source}\n",
        initial_text="Describe the restaurant in fluent English sentences, "
        "using all of the given facts:\n\n",
    ),
    "webnlg": Recipe(
        template="{source}\n",
        initial_text="Write these facts (subject | relation | object) "
        "as fluent English sentences:\n",
    ),
}


@dataclass(frozen=True, slots=True)
class Settings:
    """How to train; `lr` falls linearly to zero over `steps`."""

    steps: int
    lr: float
    batch_size: int
    seed: int


def main(
    task: Annotated[str, typer.Argument(help=f"One of: {', '.join(RECIPES)}.")],
    *,
    data: Annotated[Path, typer.Option(help="Folder with TASK/train.jsonl and TASK/dev.jsonl.")],
    out: Annotated[Path | None, typer.Option(help="Where to write; default: beside this.")] = None,
    models: Annotated[Path, typer.Option(help="The converted model's folder.")] = Path(
        ".cache/models"
    ),
    steps: Annotated[int, typer.Option(min=1)] = 250,
    lr: Annotated[float, typer.Option(help="Learning rate at the first step.")] = 5e-3,
    batch: Annotated[int, typer.Option(min=1, help="Examples in a step.")] = 16,
    seed: Annotated[int, typer.Option()] = 1,
) -> None:
    """Train TASK's prefix, measure it on the dev rows, write one safetensors file."""
    if task not in RECIPES:
        raise typer.BadParameter(f"no task {task!r}; there are {', '.join(RECIPES)}")
    recipe, console, started = RECIPES[task], Console(), time.monotonic()
    out = out or Path(__file__).with_name(f"{task}.safetensors")
    train_file, dev_file = data / task / "train.jsonl", data / task / "dev.jsonl"
    device = torch.device("cpu")
    base = load_base_model(
        DEFAULT_MODEL, device=device, dtype=default_dtype(device), cache_dir=models
    )
    settings = Settings(steps, lr, batch, seed)
    training = {
        "data": f"{task}/{train_file.name}",
        "data_sha256": sha256_of(train_file),
        "initial_text": recipe.initial_text,
        "steps": str(steps),
        "lr": str(lr),
        "batch": str(batch),
        "seed": str(seed),
    }
    for keys, values in train(base, recipe, read_rows(train_file), settings, console):
        prefix = as_prefix(base, recipe, keys, values, training)
        write(out, prefix)
    trained = time.monotonic()
    dev = read_rows(dev_file)
    scores = evaluate(base, prefix, dev)
    training |= {"dev_loss": f"{scores.loss:.3f}", "dev_bleu": f"{scores.bleu:.1f}"}
    write(out, as_prefix(base, recipe, keys, values, training))
    for row, output in list(zip(dev, scores.outputs, strict=True))[:: len(dev) // _SAMPLES]:
        console.print(f"[dim]{row.source}[/]\n{output}\n", highlight=False)
    console.print(
        f"{out}: {out.stat().st_size} bytes, dev loss {scores.loss:.3f}, dev BLEU "
        f"{scores.bleu:.1f} on {len(dev)} rows; trained in {trained - started:.0f} s, "
        f"measured in {time.monotonic() - trained:.0f} s"
    )


def train(
    base: LoadedModel, recipe: Recipe, rows: tuple[Row, ...], settings: Settings, console: Console
) -> Iterator[tuple[Tensor, Tensor]]:
    """Train keys and values; gives them (the same tensors) every so often and at the end."""
    torch.manual_seed(settings.seed)
    initial_ids = base.tokenizer.encode(recipe.initial_text, add_special_tokens=False)
    keys, values = (t.requires_grad_() for t in text_keys_values(base.model, initial_ids))
    optimizer = torch.optim.AdamW([keys, values], lr=settings.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=settings.steps)
    examples: list[Example] = [
        encode(base.tokenizer, recipe.template, row.source, reference)
        for row in rows
        for reference in row.references
    ]
    batches = endless_batches(examples, settings.batch_size, settings.seed)
    columns = (*Progress.get_default_columns()[:-1], TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}"), console=console) as bar:
        shown = bar.add_task("training", total=settings.steps, loss=float("nan"))
        mean = float("nan")
        for step, batch in zip(range(1, settings.steps + 1), batches, strict=False):
            loss = target_loss(base.model, keys, values, batch)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            mean = loss.item() if step == 1 else 0.9 * mean + 0.1 * loss.item()
            bar.update(shown, advance=1, loss=mean)
            if step % _SAVE_EVERY == 0 or step == settings.steps:
                bar.console.print(f"step {step}: loss {mean:.3f}")
                yield keys.detach(), values.detach()


def as_prefix(
    base: LoadedModel, recipe: Recipe, keys: Tensor, values: Tensor, training: Mapping[str, str]
) -> Prefix:
    """The artefact: bfloat16, for this base model alone."""
    return Prefix(
        keys.bfloat16(),
        values.bfloat16(),
        method="prefix-tuning",
        base_model=base.spec.name,
        fingerprint=base.spec.fingerprint,
        template=recipe.template,
        training=dict(training),
    )


def write(path: Path, prefix: Prefix) -> None:
    """Write the artefact whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(prefix.to_bytes())
    partial.replace(path)


if __name__ == "__main__":
    typer.run(main)
