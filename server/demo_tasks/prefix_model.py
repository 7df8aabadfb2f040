"""Run a frozen model behind a prefix: the training loss and greedy decoding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel

from prefix_store.model_loading import LoadedModel
from server.demo_tasks.data import Example


def text_keys_values(model: PreTrainedModel, token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The keys and values of a text, float32 `[num_layers, num_kv_heads, length, head_dim]`."""
    with torch.no_grad():
        cache = model(input_ids=torch.tensor([list(token_ids)]), use_cache=True).past_key_values
    keys = torch.cat([layer.keys for layer in cache.layers])
    values = torch.cat([layer.values for layer in cache.layers])
    return keys.float(), values.float()


def prefix_cache(keys: Tensor, values: Tensor, batch_size: int, dtype: torch.dtype) -> DynamicCache:
    """A cache that holds the prefix in every row; gradients reach `keys` and `values`."""
    layers = zip(keys.to(dtype), values.to(dtype), strict=True)
    return DynamicCache(
        [(k.expand(batch_size, -1, -1, -1), v.expand(batch_size, -1, -1, -1)) for k, v in layers]
    )


def target_loss(
    model: PreTrainedModel, keys: Tensor, values: Tensor, batch: Sequence[Example]
) -> Tensor:
    """Mean cross-entropy over the batch's target tokens, float32 scalar.

    Rows are padded on the right and no mask is needed: attention is causal, so no target sees the
    padding. Positions start at the prefix length because the cache already holds that many.
    """
    width = max(map(len, batch))
    input_ids = torch.zeros(len(batch), width, dtype=torch.long)
    is_target = torch.zeros(len(batch), width, dtype=torch.bool)
    for row, example in enumerate(batch):
        input_ids[row, : len(example)] = torch.tensor(example.prompt_ids + example.target_ids)
        is_target[row, len(example.prompt_ids) : len(example)] = True
    hidden = model.base_model(
        input_ids=input_ids,
        past_key_values=prefix_cache(keys, values, len(batch), model.dtype),
        use_cache=True,
    ).last_hidden_state
    # The head only where a target comes next: it is a fifth of this model's work.
    logits = model.lm_head(hidden[:, :-1][is_target[:, 1:]])
    return cross_entropy(logits.float(), input_ids[is_target])


@torch.inference_mode()
def greedy_texts(
    base: LoadedModel,
    keys: Tensor,
    values: Tensor,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> list[str]:
    """The text generated greedily after each prompt, in one batch."""
    eos = base.tokenizer.eos_token_id
    width = max(map(len, prompts))
    prefix_length = keys.shape[2]
    input_ids = torch.full((len(prompts), width), eos)
    mask = torch.ones(len(prompts), prefix_length + width, dtype=torch.long)
    for row, ids in enumerate(prompts):
        padding = width - len(ids)
        input_ids[row, padding:] = torch.tensor(list(ids))
        mask[row, prefix_length : prefix_length + padding] = 0
    output = base.model.generate(  # type: ignore[operator]
        input_ids=input_ids,
        attention_mask=mask,
        past_key_values=prefix_cache(keys, values, len(prompts), base.model.dtype),
        do_sample=False,
        max_new_tokens=max_new_tokens,
    )
    texts: list[str] = base.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return texts
