"""The base model before training: a tokenizer made for the texts, and random weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

from benchmarks.small_bart.noise import MASK

MAX_TOKENS = 512
_BOS, _PAD, _EOS, _UNKNOWN = "<s>", "<pad>", "</s>", "<unk>"
_SIZES = {
    "d_model": 192,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 768,
    "decoder_ffn_dim": 768,
    "init_std": 0.05,
}


def make_tokenizer(texts: Iterable[str], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts a text between `<s>` and `</s>`, as BART's does."""
    mask = AddedToken(MASK, lstrip=True, special=True)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[_BOS, _PAD, _EOS, _UNKNOWN, mask],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    ends = [(token, backend.token_to_id(token)) for token in (_BOS, _EOS)]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A {_EOS}", special_tokens=ends
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        bos_token=_BOS,
        pad_token=_PAD,
        eos_token=_EOS,
        unk_token=_UNKNOWN,
        mask_token=mask,
        model_max_length=MAX_TOKENS,
    )


def make_model(
    tokenizer: PreTrainedTokenizerFast, seed: int, **sizes: Any
) -> BartForConditionalGeneration:
    """A BART with random weights, and without dropout: no text is seen often."""
    torch.manual_seed(seed)
    config = BartConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=tokenizer.eos_token_id,
        dropout=0.0,
        **{**_SIZES, **sizes},
    )
    model = BartForConditionalGeneration(config)
    model.generation_config.forced_bos_token_id = tokenizer.bos_token_id
    return model


def save_start(folder: Path, texts: Iterable[str], seed: int, **sizes: Any) -> None:
    """Write what training starts from, in the form that `--base-model` takes."""
    tokenizer = make_tokenizer(texts)
    make_model(tokenizer, seed, **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
