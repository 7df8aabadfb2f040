"""Cross-entropy of target tokens, without ever holding all their logits."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

_CHUNK = 128
"""Tokens whose logits are in memory at once: with 49k words, 25 MB in float32."""


class _FrozenHeadLosses(torch.autograd.Function):
    """Losses and their gradient by the hidden states in one pass, a chunk of tokens at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden)
        for start in range(0, len(hidden), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            logits = (hidden[chunk] @ weight.T).float()
            normaliser = logits.logsumexp(-1, keepdim=True)
            target = targets[chunk, None]
            losses[chunk] = (normaliser - logits.gather(-1, target))[:, 0]
            probabilities = logits.sub_(normaliser).exp_()
            probabilities.scatter_add_(-1, target, probabilities.new_full(target.shape, -1.0))
            gradient[chunk] = probabilities.to(hidden.dtype) @ weight
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0][:, None].to(gradient.dtype), None, None


def target_losses(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """Cross-entropy of each target, in nats, float32 `[tokens]`.

    Args:
        hidden: the model's last hidden states, `[tokens, hidden_size]`.
        head: makes logits of them; where it is trained as well, all logits are kept.
        targets: the tokens to predict, int64 `[tokens]`.
    """
    if head.bias is None and not head.weight.requires_grad and hidden.requires_grad:
        losses = _FrozenHeadLosses.apply(hidden, head.weight, targets)
        return cast(Tensor, losses)
    return cross_entropy(head(hidden).float(), targets, reduction="none")


@torch.no_grad()
def linear_head(model: PreTrainedModel) -> nn.Linear | None:
    """The layer that turns last hidden states into logits; None if the model does more than that.

    Some models scale or cap their logits. Trying says it of any model.
    """
    head: object = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(head, nn.Linear):
        return None
    ids = torch.arange(4, device=model.device)[None]
    found = head(model.base_model(input_ids=ids).last_hidden_state)
    return head if torch.equal(found, model(input_ids=ids).logits) else None
