"""The oracle for encoder-decoder models: one request, its prefix concatenated by hand.

Without batching, cache or mask: the whole text is computed anew for each token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from llguidance import LLMatcher
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from prefix_store.groups import Group, KeysValues
from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix


def random_groups(loaded: LoadedModel, groups: tuple[Group, ...], length: int, seed: int) -> Prefix:
    """Keys and values of any length in any groups."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(group: Group) -> Tensor:
        return torch.randn(loaded.spec.shape(group, length), generator=generator)

    return Prefix(
        {group: KeysValues(numbers(group), numbers(group), group) for group in groups},
        method="random",
        encoder_decoder=True,
    )


@torch.inference_mode()
def greedy(
    loaded: LoadedModel,
    prefix: Prefix | None,
    source_ids: tuple[int, ...],
    max_new_tokens: int,
    matcher: LLMatcher | None = None,
) -> tuple[list[int], Tensor]:
    """New token ids, and float32 logits `[new, vocab]`, the whole text computed anew each time.

    Args:
        matcher: of the tokens that it allows the likeliest is taken, until it allows no more.
    """
    model, config = loaded.model, loaded.model.config
    groups: Mapping[Group, KeysValues] = {} if prefix is None else prefix.groups
    output, logits = [config.decoder_start_token_id], []
    with _prefixed(model, groups):
        while len(logits) < max_new_tokens:
            step = model(
                input_ids=torch.tensor([source_ids]),
                decoder_input_ids=torch.tensor([output]),
                use_cache=False,
            ).logits[0, -1]
            logits.append(step)
            if matcher is not None:
                allowed = torch.tensor(list(matcher.compute_logit_bias())) > 0
                step = step.masked_fill(~allowed, -torch.inf)
            output.append(int(step.argmax()))
            if matcher is not None and matcher.consume_token(output[-1]) and matcher.is_stopped():
                break
            if output[-1] == config.eos_token_id:
                break
    return output[1:], torch.stack(logits)


@torch.inference_mode()
def teacher_forced(
    loaded: LoadedModel, prefix: Prefix, source_ids: tuple[int, ...], target_ids: list[int]
) -> Tensor:
    """Logits of each target token after those before it, `[target, vocab]`."""
    model = loaded.model
    labels = torch.tensor([target_ids])
    with _prefixed(model, prefix.groups):
        logits: Tensor = model(
            input_ids=torch.tensor([source_ids]),
            decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels),
            use_cache=False,
        ).logits[0]
    return logits


@contextmanager
def _prefixed(model: PreTrainedModel, groups: Mapping[Group, KeysValues]) -> Iterator[None]:
    """Within it, `model` attends by hand, the prefix in front, and counts positions behind it."""
    parts = (model, model.get_encoder(), model.get_decoder())
    before = model.config._attn_implementation
    AttentionInterface.register(_BY_HAND, _Attention(model, groups))
    for part in parts:
        part.set_attn_implementation(_BY_HAND)
    embed = getattr(model.get_decoder(), "embed_positions", nn.Identity())
    length = groups["decoder"].prefix_length if "decoder" in groups else 0
    hook = embed.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"position_ids": kwargs["position_ids"] + length}),
        with_kwargs=True,
    )
    try:
        yield
    finally:
        hook.remove()
        for part in parts:
            part.set_attn_implementation(before)


class _Attention:
    """softmax(q k + bias) v, for one row, with no mask but the decoder's own."""

    def __init__(self, model: PreTrainedModel, groups: Mapping[Group, KeysValues]) -> None:
        self._model = model
        self._places = _places(model)
        self._groups = groups

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        _mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        group, layer = self._places[module]
        scaling, bias = kwargs["scaling"], kwargs.get("position_bias")
        scores = query @ key.mT * scaling
        if bias is not None:
            bias = _bias(self._model, key.shape[-2], 0) if group == "decoder" else bias
            scores = scores + bias
        if group == "decoder":
            later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        if group in self._groups:
            prefix = self._groups[group]
            to_prefix = query @ prefix.keys[layer][None].mT * scaling
            if bias is not None and group == "decoder":
                to_prefix = to_prefix + _bias(self._model, key.shape[-2], prefix.prefix_length)
            scores = torch.cat([to_prefix, scores], dim=-1)
            value = torch.cat([prefix.values[layer][None], value], dim=-2)
        return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


def _bias(model: PreTrainedModel, queries: int, length: int) -> Tensor:
    """T5's bias of `queries` behind `length` prefix positions: towards these, or each other."""
    [attention] = [
        m for m in model.get_decoder().modules() if getattr(m, "has_relative_attention_bias", False)
    ]
    at = torch.arange(queries)[:, None] + length
    keys = torch.arange(length) if length else torch.arange(queries)
    buckets = attention._relative_position_bucket(
        keys - at,
        bidirectional=False,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    return attention.relative_attention_bias(buckets).permute(2, 0, 1)[None]


def _places(model: PreTrainedModel) -> dict[nn.Module, tuple[Group, int]]:
    places: dict[nn.Module, tuple[Group, int]] = {}
    for part, groups in ((model.get_encoder(), ("encoder",)), (model.get_decoder(), _DECODER)):
        blocks = part.layers if hasattr(part, "layers") else part.block
        for layer, block in enumerate(blocks):
            attentions = [
                m
                for m in block.modules()
                if type(m).__name__.endswith("Attention")
                and (hasattr(m, "k_proj") or hasattr(m, "k"))
            ]
            for group, attention in zip(groups, attentions, strict=True):
                places[attention] = (group, layer)
    return places


_DECODER: tuple[Group, ...] = ("decoder", "cross")
_BY_HAND = "by_hand"
