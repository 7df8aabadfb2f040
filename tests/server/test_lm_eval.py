"""EleutherAI's harness scores a task through the server as transformers does by itself."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix
from tests.engine.reference import as_cache
from tests.server.live import LiveServer

ROWS = [
    {"question": "The capital of France is", "choices": ["Paris", "a city", "né"], "answer": 0},
    {"question": "Water boils at a hundred", "choices": ["degrees", "miles per hour"], "answer": 0},
    {"question": "日本の首都は", "choices": ["東京", "大阪です"], "answer": 0},
    {"question": "A cat is an", "choices": ["animal", "idea of the river"], "answer": 1},
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task of lm-eval's and its data."""
    folder = tmp_path_factory.mktemp("lm-eval")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    task = {
        "task": "small",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(task))
    return folder


@torch.inference_mode()
def expected_scores(
    loaded: LoadedModel, prefix: Prefix | None, question: str, choice: str
) -> tuple[float, bool]:
    """The choice's log-likelihood after the question, and whether greedy decoding gives it."""
    context = loaded.tokenizer(question)["input_ids"]
    ids = loaded.tokenizer(f"{question} {choice}")["input_ids"]
    cache = None if prefix is None else as_cache(prefix)
    logits = loaded.model(torch.tensor([ids]), past_key_values=cache).logits[0, :-1]
    own = torch.tensor(ids[len(context) :])
    logprobs = logits.log_softmax(-1)[len(context) - 1 :]
    total = logprobs.gather(1, own[:, None]).sum()
    return float(total), bool((logprobs.argmax(-1) == own).all())


@pytest.fixture(scope="module")
def lm_eval(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The harness, kept from looking anything up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        importlib.import_module("lm_eval.tasks")
        yield importlib.import_module("lm_eval")


@pytest.mark.parametrize("task_id", [None, "middle"])
def test_log_likelihoods_are_those_of_transformers(
    server: LiveServer,
    endless: LoadedModel,
    prefixes: dict[str, Prefix],
    lm_eval: ModuleType,
    *,
    tasks: Path,
    task_id: str | None,
) -> None:
    result = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": task_id or endless.spec.name,
            "base_url": f"{server.url}/v1/completions",
            "tokenizer_backend": "huggingface",
            "tokenizer": endless.spec.name,
            "num_concurrent": 3,
            "max_length": 512,
        },
        tasks=["small"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    assert result is not None
    right = 0
    samples = sorted(result["samples"]["small"], key=lambda sample: sample["doc_id"])
    for sample, row in zip(samples, ROWS, strict=True):
        expected = [
            expected_scores(
                endless, prefixes[task_id] if task_id else None, row["question"], choice
            )
            for choice in row["choices"]
        ]
        found = [
            (float(score), str(greedy) == "True") for score, greedy in sample["filtered_resps"]
        ]
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        # Each token's to 1e-4, as the engine's contract says; these are sums of a few.
        assert [score for score, _ in found] == pytest.approx([s for s, _ in expected], abs=1e-3)
        best = max(range(len(expected)), key=lambda i: expected[i][0])
        right += best == row["answer"]
    assert result["results"]["small"]["acc,none"] == right / len(ROWS)
