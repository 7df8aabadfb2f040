"""The oracle: transformers on one request alone."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix


def random_prefix(loaded: LoadedModel, length: int, seed: int) -> Prefix:
    """Keys and values like a model's own, of any length."""
    spec = loaded.spec
    generator = torch.Generator().manual_seed(seed)
    shape = (spec.num_layers, spec.num_kv_heads, length, spec.head_dim)
    keys = torch.randn(shape, generator=generator)
    return Prefix.of(keys, torch.randn(shape, generator=generator), method="random")


def as_cache(prefix: Prefix) -> DynamicCache:
    """The prefix as transformers' own `past_key_values` for one row."""
    cache = DynamicCache()
    for layer in range(prefix.keys.shape[0]):
        cache.update(prefix.keys[layer][None].clone(), prefix.values[layer][None].clone(), layer)
    return cache


@torch.inference_mode()
def greedy(
    loaded: LoadedModel, prefix: Prefix | None, prompt_ids: tuple[int, ...], max_new_tokens: int
) -> tuple[list[int], torch.Tensor]:
    """`generate` on this request alone: new token ids, and float32 logits `[new, vocab]`."""
    length = 0 if prefix is None else prefix.prefix_length
    # generate skips as many leading ids as the cache holds, whatever they are.
    input_ids = torch.tensor([[0] * length + list(prompt_ids)])
    output = loaded.model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        past_key_values=as_cache(prefix) if prefix is not None else None,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences[0, input_ids.shape[1] :].tolist(), torch.cat(output.logits).float()


@torch.inference_mode()
def searched(
    loaded: LoadedModel, prefix: Prefix | None, prompt_ids: tuple[int, ...], **settings: Any
) -> list[int]:
    """What beam search in `generate` finds for this request alone; `settings` are generate's."""
    length = 0 if prefix is None else prefix.prefix_length
    cache = None if prefix is None else as_cache(prefix)
    if cache is not None:
        cache.batch_repeat_interleave(settings["num_beams"])
    # In the prefix's place ids that no n-gram of the text has; generate skips them.
    vocab = loaded.model.config.vocab_size
    input_ids = torch.tensor([[*range(vocab, vocab + length), *prompt_ids]])
    output = loaded.model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        past_key_values=cache,
        do_sample=False,
        pad_token_id=0,
        **settings,
    )
    found: list[int] = output[0, input_ids.shape[1] :].tolist()
    return found
