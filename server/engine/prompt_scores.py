"""What the model thought of a prompt's tokens before it read them."""

from __future__ import annotations

import torch

from server.engine.kernels import likeliest
from server.engine.protocol import PromptToken
from server.engine.sampling import top_logprobs
from server.engine.scheduler import Span


def score_prompt(logits: torch.Tensor, span: Span) -> list[PromptToken] | None:
    """The tokens of the prompt that follow each of the span's; None where the logits hold NaN or
    infinity.

    Args:
        logits: `[tokens, vocab]`, after each of the span's tokens.
    """
    _, normalizer = likeliest(logits)
    if not bool(normalizer.isfinite().all()):
        return None
    sequence = span.sequence
    after_first = span.start - sequence.prefix_length + 1
    token_ids = sequence.prompt_ids[after_first : after_first + len(span.token_ids)]
    if not token_ids:
        return []
    rows, normalizer = logits[: len(token_ids)], normalizer[: len(token_ids)]
    chosen = torch.tensor(token_ids, device=rows.device)[:, None]
    logprobs = rows.gather(1, chosen)[:, 0].float() - normalizer
    wanted = sequence.request.sampling.prompt_logprobs or 0
    top = top_logprobs(rows, normalizer, [wanted] * len(token_ids))
    return list(map(PromptToken, token_ids, logprobs.tolist(), top))
