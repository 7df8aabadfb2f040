"""The next token of every row, chosen in one pass over the batch."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch

from server.engine.kernels import likeliest
from server.engine.processors import changes_scores, process
from server.engine.protocol import SamplingParams, TokenLogprob
from server.engine.sequence import Sequence
from server.engine.special_tokens import SpecialTokens


@dataclass(frozen=True, slots=True)
class Sample:
    """A row's next token and the likeliest alternatives, with the model's own log-probabilities."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


def sample(
    logits: torch.Tensor, sequences: Rows[Sequence], special_tokens: SpecialTokens
) -> list[Sample | None]:
    """Choose each row's next token as its `SamplingParams` say.

    Args:
        logits: `[rows, vocab]` of any floating dtype.
        sequences: one per row; each sampled one draws one number from its own generator, so the
            choice does not depend on the rest of the batch.

    Returns:
        One sample per row, None where the row's logits hold NaN or infinity.
    """
    token_ids, normalizer = likeliest(logits)
    finite = normalizer.isfinite().tolist()
    special = [
        i
        for i, (sequence, token_id) in enumerate(zip(sequences, token_ids.tolist(), strict=True))
        if finite[i] and not _suffices(token_id, sequence, special_tokens)
    ]
    if special:
        token_ids[special] = _choose_special(
            logits[special].float(), [sequences[i] for i in special], special_tokens
        )
    logprobs = logits.gather(1, token_ids[:, None])[:, 0].float() - normalizer
    wanted = [sequence.request.sampling.top_logprobs for sequence in sequences]
    top = top_logprobs(logits, normalizer, wanted)
    rows = zip(finite, token_ids.tolist(), logprobs.tolist(), top, strict=True)
    return [
        Sample(TokenLogprob(token_id, logprob), alternatives) if ok else None
        for ok, token_id, logprob, alternatives in rows
    ]


def _suffices(likeliest_id: int, sequence: Sequence, special_tokens: SpecialTokens) -> bool:
    """Is the likeliest token a sequence's next one, whatever the others' scores are?"""
    if sequence.request.sampling.do_sample or changes_scores(sequence, special_tokens):
        return False
    return sequence.matcher is None or sequence.matcher.allows(likeliest_id)


def _choose_special(
    logits: torch.Tensor, sequences: Rows[Sequence], special_tokens: SpecialTokens
) -> torch.Tensor:
    """Token ids `[rows]` of rows that are processed or sampled; float32 `logits` is overwritten."""
    for row, sequence in zip(logits, sequences, strict=True):
        if sequence.matcher is not None or changes_scores(sequence, special_tokens):
            process(row, sequence, special_tokens)
    params = [s.request.sampling for s in sequences]
    token_ids = logits.argmax(dim=-1)
    drawn = [i for i, p in enumerate(params) if p.do_sample]
    if drawn:
        rows = torch.tensor(drawn, device=logits.device)
        uniforms = torch.tensor([sequences[i].rng.random() for i in drawn], device=logits.device)
        token_ids[rows] = draw(logits[rows], [params[i] for i in drawn], uniforms)
    return token_ids


def draw(
    logits: torch.Tensor, params: Rows[SamplingParams], uniforms: torch.Tensor
) -> torch.Tensor:
    """Invert each row's cumulative distribution at its own uniform number in [0, 1).

    Args:
        logits: float32 `[rows, vocab]`.
        params: temperature and filters of each row.
        uniforms: float `[rows]`.

    Returns:
        int64 `[rows]`.
    """
    scores = logits / _column([p.temperature for p in params], logits)
    filtered = [
        i
        for i, p in enumerate(params)
        if p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0 or p.typical_p < 1.0
    ]
    if filtered:
        rows = torch.tensor(filtered, device=logits.device)
        scores[rows] = filter_logits(scores[rows], [params[i] for i in filtered])
    # float64: 50k float32 additions would blur the cumulative sum more than the tokens differ.
    cumulative = scores.softmax(dim=-1).double().cumsum(dim=-1)
    targets = uniforms.double()[:, None] * cumulative[:, -1:]
    token_ids = torch.searchsorted(cumulative, targets, right=True)[:, 0]
    return token_ids.clamp_(max=logits.shape[-1] - 1)


def filter_logits(scores: torch.Tensor, params: Rows[SamplingParams]) -> torch.Tensor:
    """`scores` with everything outside top_k, then top_p, min_p and typical_p set to -inf.

    The same rules, in the same order, as transformers' logits warpers.
    """
    vocab = scores.shape[-1]
    ranked, token_ids = scores.sort(dim=-1, descending=True)
    top_k = torch.tensor([min(p.top_k or vocab, vocab) for p in params], device=scores.device)
    smallest = ranked.gather(1, top_k[:, None] - 1)
    ranked = ranked.masked_fill(ranked < smallest, -torch.inf)

    probs = ranked.softmax(dim=-1)
    # Summed from the least likely, whose small terms a sum from the top would round away; below
    # zero for "off", which no sum reaches.
    tail = probs.flip(-1).cumsum(dim=-1).flip(-1)
    dropped = tail <= _column([1 - p.top_p if p.top_p < 1.0 else -1.0 for p in params], probs)
    dropped |= probs < _column([p.min_p for p in params], probs) * probs[:, :1]
    dropped[:, 0] = False  # the likeliest token always stays
    ranked = ranked.masked_fill(dropped, -torch.inf)

    if any(p.typical_p < 1.0 for p in params):
        ranked = _keep_typical(ranked, _column([p.typical_p for p in params], probs))
    return torch.full_like(scores, -torch.inf).scatter_(1, token_ids, ranked)


def _keep_typical(scores: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """Locally typical sampling (Meister et al. 2022): keep what is about as surprising as usual."""
    logprobs = scores.log_softmax(dim=-1)
    probs = logprobs.exp()
    entropy = -(logprobs * probs).nansum(dim=-1, keepdim=True)
    distance, order = (-logprobs - entropy).abs().sort(dim=-1)
    reached = probs.gather(1, order).cumsum(dim=-1)
    last = (reached < mass).sum(dim=-1, keepdim=True).clamp_(max=scores.shape[-1] - 1)
    threshold = torch.where(mass < 1.0, distance.gather(1, last), torch.inf)
    return scores.masked_fill((-logprobs - entropy).abs() > threshold, -torch.inf)


def top_logprobs(
    logits: torch.Tensor, normalizer: torch.Tensor, wanted: Rows[int]
) -> list[tuple[TokenLogprob, ...]]:
    """So many of each row's likeliest tokens, likeliest first.

    Args:
        logits: `[rows, vocab]`.
        normalizer: float32 `[rows]`, the logarithm of the sum of their exponentials.
    """
    most = min(max(wanted), logits.shape[-1])
    if most == 0:
        return [()] * len(wanted)
    best = logits.float().topk(most, dim=-1)
    logprobs = (best.values - normalizer[:, None]).tolist()
    return [
        tuple(TokenLogprob(t, p) for t, p in zip(ids[:n], row[:n], strict=True))
        for n, ids, row in zip(wanted, best.indices.tolist(), logprobs, strict=True)
    ]


def _column(values: list[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, device=like.device, dtype=like.dtype)[:, None]
