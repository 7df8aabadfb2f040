"""What the small BART is trained on, and that others can load it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from benchmarks.small_bart.base import save_start
from benchmarks.small_bart.data import compression_rows
from benchmarks.small_bart.noise import MASK, noised, pretraining_rows, sentences, styled
from benchmarks.small_bart.report import write_report
from benchmarks.small_bart.scoring import METRICS
from clients.data import Row
from prefix_store.groups import GROUPS
from prefix_store.model_loading import load_base_model

TEXT = "Aarhus Airport serves Aarhus. Its runway is 2776 metres long. J. R. Smith built it."
ONE = 'Aarhus_Airport | cityServed | "Aarhus, Denmark" && Aarhus_Airport | elevation | 25.0'
TWO = "Aarhus_Airport | cityServed | Aarhus && Aarhus | country | Denmark"


def test_a_short_title_ends_no_sentence() -> None:
    assert sentences(TEXT) == [
        "Aarhus Airport serves Aarhus.",
        "Its runway is 2776 metres long.",
        "J. R. Smith built it.",
    ]


def test_a_texts_first_sentence_is_its_compression() -> None:
    rows = compression_rows([TEXT, "Only one.", TEXT])
    assert rows == [Row(TEXT, ("Aarhus Airport serves Aarhus.",))]


def test_noise_leaves_words_and_masks() -> None:
    found = [noised(TEXT, np.random.default_rng(seed)).split() for seed in range(200)]
    words = TEXT.split()
    assert all(set(one) <= {*words, MASK} for one in found)
    kept = sum(word != MASK for one in found for word in one) / (len(found) * len(words))
    assert 0.6 < kept < 0.8
    starts = {one[0] for one in found}
    assert {"Aarhus", "Its", "J.", MASK} <= starts


def test_facts_about_one_thing_are_attributes_half_of_the_time() -> None:
    found = [styled(ONE, np.random.default_rng(seed)) for seed in range(100)]
    attributes = "name : Aarhus Airport | city served : Aarhus, Denmark | elevation : 25.0"
    assert set(found) == {ONE, attributes}
    assert 30 < found.count(ONE) < 70
    assert {styled(TWO, np.random.default_rng(seed)) for seed in range(20)} == {TWO}


def test_rows_are_facts_and_texts_the_same_each_time() -> None:
    pairs, texts = [(ONE, "It serves Aarhus."), (TWO, "It is there.")], [TEXT, "Only one."]
    rows = list(pretraining_rows(pairs, texts, 100, seed=3))
    assert rows == list(pretraining_rows(pairs, texts, 100, seed=3))
    assert {text for row in rows for text in row.references} == {*texts, *(t for _, t in pairs)}
    repaired = sum(row.references[0] in texts for row in rows)
    assert 30 < repaired < 70


def test_a_start_is_a_base_model_whose_tokenizer_loses_nothing(tmp_path: Path) -> None:
    small = {"d_model": 16, "encoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    save_start(tmp_path, [TEXT, ONE, TWO], seed=1, **small)
    loaded = load_base_model(
        str(tmp_path), device=torch.device("cpu"), dtype=torch.float32, cache_dir=tmp_path
    )
    assert loaded.spec.groups == GROUPS
    for text in (f"A{MASK} né £5 | 東京", TEXT):
        ids = loaded.tokenizer.encode(text)
        assert (ids[0], ids[-1]) == (loaded.tokenizer.bos_token_id, loaded.tokenizer.eos_token_id)
        assert loaded.tokenizer.decode(ids[1:-1]) == text
    assert loaded.tokenizer.mask_token_id in loaded.tokenizer.encode(f"A {MASK}")


def test_the_report_says_what_the_results_say(tmp_path: Path) -> None:
    facts = {"parameters": 1234, "steps": 7, "dev_loss": 1.5, "resumed": False}
    facts |= {"cpu_seconds": 90.0, "wall_seconds": 120.0}
    writers = ("without a prefix", "all", "all, 4 beams", "decoder")
    score = {metric: {"value": 50.0, "low": 49.0, "high": 51.0} for metric in METRICS}
    example = {"source": "facts", "reference": "wanted", **{name: f"by {name}" for name in writers}}
    task = {"rows": 3, "scores": dict.fromkeys(writers, score), "examples": [example]}
    results = {
        "date": "2026-01-02 03:04 UTC",
        "machine": {"cpu": "a processor", "cores": 2, "torch": "2"},
        "rows": 40,
        "base": facts,
        "trainings": {"e2e-all": facts | {"resumed": True}},
        "tasks": {"e2e": task, "compression": task},
    }
    write_report(results, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "| base | 1,234 | 7 | 1.500 | 1.5 min of one core in 2.0 min |" in page
    assert "in 2.0 min (its last part: it was interrupted) |" in page
    assert page.count("| 48 vectors in the decoder | 50.0 (49.0 to 51.0) |") == 2
    assert page.count("  all, 4 beams: by all, 4 beams\n") == 2
