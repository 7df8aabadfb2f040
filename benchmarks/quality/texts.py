"""What a trained task writes: through a server, wherever a server can serve it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import GenerationConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from benchmarks.common import load_model
from benchmarks.http import running_server
from benchmarks.quality.plan import Run
from clients import Client
from clients._async_client import AsyncClient
from clients.data import Row
from clients.evaluation import Output, generate_outputs
from clients.training import Trained
from clients.training.build import build
from clients.training.settings import TrainSettings
from prefix_store.model_loading import DEFAULT_MODEL, LoadedModel
from prefix_store.prefix import SOURCE

BASE, BASE_PLAIN, BASE_BARE = "base", "base-plain", "base-bare"
BASES = (BASE, BASE_PLAIN, BASE_BARE)
"""The untouched model: with an instruction in its chat template, with the same as plain text, and
with nothing but the source."""
INSTRUCTION = (
    "Describe the restaurant in one or two fluent English sentences, using all of the given facts "
    "and nothing else:\n"
)
_NEW_TOKENS = 128
_BATCH = 32
_TIMEOUT_SECONDS = 600.0
_TASK = "quality"


def write_base_texts(name: str, rows: Sequence[Row]) -> list[Output]:
    """Greedy texts of the untouched model, prompted as one of `BASES` says."""
    tokenizer = load_model().tokenizer
    return _served(DEFAULT_MODEL, [_prompted(name, tokenizer, row.source) for row in rows])


def write_texts(
    run: Run, trained: Trained, train_rows: Sequence[Row], rows: Sequence[Row]
) -> list[Output]:
    """Greedy texts, one a row, of at most 128 tokens.

    A prefix and a soft prompt are uploaded as tasks; fine-tuned weights and merged LoRA weights are
    a server's base model; bottleneck adapters, which no server here takes, run in transformers.
    """
    settings, sources = run.settings, [row.source for row in rows]
    if settings.method == "adapter":
        return _with_adapters(settings, trained.path, train_rows, sources)
    if settings.method in {"prefix", "direct"}:
        return _served(DEFAULT_MODEL, sources, task=trained.path)
    prompts = [settings.template.replace(SOURCE, source) for source in sources]
    if settings.method == "prompt-tuning":
        return _served(DEFAULT_MODEL, prompts, task=trained.path)
    if settings.method == "lora":
        with TemporaryDirectory() as folder:
            _merge(trained.path, Path(folder))
            return _served(folder, prompts)
    return _served(str(trained.path), prompts)


def _prompted(name: str, tokenizer: PreTrainedTokenizerBase, source: str) -> str:
    if name == BASE_BARE:
        return f"{source}\n"
    if name == BASE_PLAIN:
        return f"{INSTRUCTION}{source}\n"
    chat = [{"role": "user", "content": INSTRUCTION + source}]
    return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


def _served(model: str, prompts: Sequence[str], task: Path | None = None) -> list[Output]:
    """Of a server of `model`, by the prefix at `task` or by the model itself."""
    with running_server("--model", model) as server:
        if task is not None:
            with Client(server.url) as client:
                client.upload(_TASK, task)
        [outputs] = asyncio.run(_generate(server.url, None if task is None else _TASK, prompts))
    return list(outputs)


async def _generate(
    url: str, task: str | None, prompts: Sequence[str]
) -> tuple[tuple[Output, ...], ...]:
    async with AsyncClient(url, timeout=_TIMEOUT_SECONDS) as client:
        return await generate_outputs(client, [task], prompts, {"max_new_tokens": _NEW_TOKENS})


def _merge(adapter: Path, folder: Path) -> None:
    """Write the default model with a LoRA adapter's weights added to its own."""
    import peft  # noqa: PLC0415 - an extra

    loaded = load_model(torch.float32)
    merged = peft.PeftModel.from_pretrained(loaded.model, adapter).merge_and_unload()
    merged.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


@torch.inference_mode()
def _with_adapters(
    settings: TrainSettings, path: Path, train_rows: Sequence[Row], sources: Sequence[str]
) -> list[Output]:
    loaded = load_model()
    build(settings, loaded, train_rows, None).load_state_dict(load_file(path))
    loaded.model.eval()  # type: ignore[no-untyped-call]
    prompts = [settings.template.replace(SOURCE, source) for source in sources]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    for start in range(0, len(order), _BATCH):
        batch = order[start : start + _BATCH]
        written = _generate_batch(loaded, [prompts[i] for i in batch])
        for i, text in zip(batch, written, strict=True):
            texts[i] = text
    return [Output(text.strip()) for text in texts]


def _generate_batch(loaded: LoadedModel, prompts: Sequence[str]) -> list[str]:
    tokenizer = loaded.tokenizer
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True)
    greedy = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=_NEW_TOKENS,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model: Any = loaded.model
    ids = model.generate(**inputs, generation_config=greedy)
    width = inputs["input_ids"].shape[1]
    texts: list[str] = tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)
    return texts
