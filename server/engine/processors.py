"""What is done to a row's scores before a token is chosen, in transformers' order.

See `GenerationMixin._get_logits_processor` there. The same is done to the logits of a greedy or
sampled sequence and to the log-probabilities of a beam.
"""

from __future__ import annotations

import torch

from server.engine.sequence import Sequence
from server.engine.special_tokens import SpecialTokens


def changes_scores(sequence: Sequence, special: SpecialTokens) -> bool:
    """False where `process` would leave the next token's scores as they are, but for a grammar."""
    params, generated = sequence.request.sampling, len(sequence.output_ids)
    return (
        params.repetition_penalty != 1.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
        or params.no_repeat_ngram_size > 0
        or generated < params.min_new_tokens
        or forced(sequence, special) is not None
    )


def process(scores: torch.Tensor, sequence: Sequence, special: SpecialTokens) -> None:
    """Change one row's float32 scores, `[vocab]`, in place."""
    params = sequence.request.sampling
    text = [*sequence.prompt_ids, *sequence.output_ids]
    if params.repetition_penalty != 1.0:
        seen = torch.unique(torch.tensor(text, device=scores.device))
        score, penalty = scores[seen], params.repetition_penalty
        scores[seen] = torch.where(score > 0, score / penalty, score * penalty)
    if params.frequency_penalty != 0.0:
        output = torch.tensor(sequence.output_ids, device=scores.device, dtype=torch.int64)
        scores.scatter_add_(0, output, scores.new_full(output.shape, -params.frequency_penalty))
    if params.presence_penalty != 0.0:
        scores[list(set(sequence.output_ids))] -= params.presence_penalty
    if banned := _repeats(text, params.no_repeat_ngram_size):
        scores[banned] = -torch.inf
    if len(sequence.output_ids) < params.min_new_tokens:
        scores[list(special.eos)] = -torch.inf
    if (token := forced(sequence, special)) is not None:
        scores.fill_(-torch.inf)
        scores[token] = 0
    elif sequence.matcher is not None:
        sequence.matcher.mask(scores)


def _repeats(text: list[int], size: int) -> list[int]:
    """Tokens that would end a sequence of `size` tokens which the text has already."""
    if size == 0:
        return []
    start = len(text) - size + 1
    begun = text[start:] if start >= 0 else None
    return [text[i + size - 1] for i in range(start) if text[i : i + size - 1] == begun]


def forced(sequence: Sequence, special: SpecialTokens) -> int | None:
    """The one token that may come, if the model's own configuration says so."""
    params, generated = sequence.request.sampling, len(sequence.output_ids)
    at_end = generated == params.max_new_tokens - 1 and sequence.matcher is None
    if special.forced_eos is not None and at_end:
        return special.forced_eos
    if special.forced_bos is not None and len(sequence.prompt_ids) + generated == 1:
        return special.forced_bos
    return None
