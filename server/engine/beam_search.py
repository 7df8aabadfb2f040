"""Beam search of one request, with the hypotheses that transformers' own finds.

See `GenerationMixin._beam_search` there: scores are sums of processed log-probabilities; of the
best candidates, those that end a text are finished hypotheses, the others the next beams.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from server.engine.processors import changes_scores, process
from server.engine.protocol import TokenLogprob
from server.engine.sampling import Sample, top_logprobs
from server.engine.sequence import Sequence
from server.engine.special_tokens import SpecialTokens

_NEVER = -1e9


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A beam with one token more."""

    score: float
    parent: int
    sample: Sample
    ends: bool


@dataclass(frozen=True, slots=True)
class _Hypothesis:
    """A finished text; `score` has the length penalty in it."""

    score: float
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class Reordering:
    """Slot `targets[i]` is to hold what slot `sources[i]` held before, all at once.

    Attributes:
        start, end: the positions at which they differ.
        prefix_length: positions of the task's prefix, which come first and do not differ later.
    """

    sources: tuple[int, ...]
    targets: tuple[int, ...]
    start: int
    end: int
    prefix_length: int


class BeamSearch:
    """The beams of one request: its sequence and the sequence's siblings, each in a slot."""

    def __init__(self, leader: Sequence, special: SpecialTokens) -> None:
        """
        Args:
            leader: computes the prompt, from which all beams start.
        """
        self._beams = leader.beams
        self._params = leader.request.sampling
        self._special = special
        self._eos = frozenset() if self._params.ignore_eos else special.eos
        self._scores = [0.0, *[_NEVER] * len(leader.siblings)]
        self._samples: list[tuple[Sample, ...]] = [()] * len(self._beams)
        self._finished: list[_Hypothesis] = []  # the best first
        self._done = False

    @property
    def running(self) -> tuple[Sequence, ...]:
        """Whose logits `advance` takes, in this order."""
        return self._beams if self._samples[0] else self._beams[:1]

    @property
    def best(self) -> tuple[Sample, ...] | None:
        """The tokens of the best hypothesis, once the search has ended."""
        return self._finished[0].samples if self._done else None

    def advance(self, logits: torch.Tensor) -> Reordering | None:
        """Choose every beam's next token; None where the logits hold NaN or infinity.

        Args:
            logits: `[beams, vocab]`, of the sequences in `running`.
        """
        candidates = self._candidates(logits.float())
        if candidates is None:
            return None
        length = len(self._samples[0]) + 1
        self._finish(candidates, length)
        by_score = sorted(candidates, key=lambda c: c.score + _NEVER * c.ends, reverse=True)
        chosen = by_score[: len(self._beams)]
        self._done = self._has_ended(candidates, chosen[0], length)
        return self._follow(chosen)

    def _candidates(self, logits: torch.Tensor) -> list[_Candidate] | None:
        """The best continuations of all beams, the best first."""
        normalizer = logits.logsumexp(-1)
        if not bool(normalizer.isfinite().all()):
            return None
        logprobs = logits - normalizer[:, None]
        scores = logprobs.clone()
        for row, beam in zip(scores, self.running, strict=True):
            if changes_scores(beam, self._special):
                process(row, beam, self._special)
        vocab, count = scores.shape[-1], len(self._beams)
        before = torch.tensor(self._scores, device=scores.device)
        # At first there is one row: the other beams are the same with a score that never wins.
        totals = (scores.expand(count, vocab) + before[:, None]).flatten()
        best = totals.topk(min(max(2, 1 + len(self._eos)) * count, len(totals)))
        parents, tokens = best.indices // vocab, best.indices % vocab
        rows = parents.clamp(max=len(logits) - 1)
        own = logprobs[rows, tokens].tolist()
        wanted = self._params.top_logprobs
        top = top_logprobs(logits, normalizer, [wanted] * len(logits))
        ends_all = len(self._samples[0]) + 1 == self._params.max_new_tokens
        return [
            _Candidate(
                score,
                parent,
                Sample(TokenLogprob(token, logprob), top[row]),
                ends_all or token in self._eos,
            )
            for score, parent, token, row, logprob in zip(
                best.values.tolist(),
                parents.tolist(),
                tokens.tolist(),
                rows.tolist(),
                own,
                strict=True,
            )
        ]

    def _finish(self, candidates: list[_Candidate], length: int) -> None:
        """Keep the best of the hypotheses that end here; what is below the beams does not count."""
        if self._params.early_stopping is True and self._is_full:
            return
        for candidate in candidates[: len(self._beams)]:
            if candidate.ends:
                samples = (*self._samples[candidate.parent], candidate.sample)
                score = candidate.score / length**self._params.length_penalty
                self._finished.append(_Hypothesis(score, samples))
        self._finished.sort(key=lambda hypothesis: hypothesis.score, reverse=True)
        del self._finished[len(self._beams) :]

    @property
    def _is_full(self) -> bool:
        return len(self._finished) == len(self._beams)

    def _has_ended(self, candidates: list[_Candidate], best: _Candidate, length: int) -> bool:
        if all(candidate.ends for candidate in candidates):
            return True
        if not self._is_full:
            return False
        params = self._params
        if params.early_stopping is True:
            return True
        grows = params.early_stopping == "never" and params.length_penalty > 0
        at_length = params.max_new_tokens if grows else length
        running = best.score + _NEVER * best.ends
        possible: float = running / at_length**params.length_penalty
        return possible <= self._finished[-1].score

    def _follow(self, chosen: list[_Candidate]) -> Reordering:
        """Make the chosen candidates the beams."""
        leader = self._beams[0]
        outputs = [self._beams[c.parent].output_ids for c in chosen]
        # Until the first token is chosen only the leader's slot is filled.
        parents = [self._beams[c.parent if self._samples[0] else 0] for c in chosen]
        pairs = [
            (parent, beam)
            for parent, beam in zip(parents, self._beams, strict=True)
            if parent is not beam
        ]
        reordering = Reordering(
            tuple(parent.slot for parent, _ in pairs),
            tuple(beam.slot for _, beam in pairs),
            start=self._first_difference(pairs),
            end=leader.length,
            prefix_length=leader.prefix_length,
        )
        self._samples = [(*self._samples[c.parent], c.sample) for c in chosen]
        self._scores = [c.score + _NEVER * c.ends for c in chosen]
        for beam, output, candidate in zip(self._beams, outputs, chosen, strict=True):
            beam.output_ids = [*output, candidate.sample.chosen.token_id]
            beam.length = leader.length
        return reordering

    def _first_difference(self, pairs: list[tuple[Sequence, Sequence]]) -> int:
        """The first position at which the slots of a pair of beams differ.

        Beams part late: to copy the prompt each time would take as long as the model's step.
        """
        if not self._samples[0]:
            return 0
        shared = [_shared(parent.output_ids, beam.output_ids) for parent, beam in pairs]
        return self._beams[0].prompt_end + min(shared, default=0)


def _shared(one: list[int], other: list[int]) -> int:
    """How many tokens two texts of one length have in common before they part."""
    pairs = enumerate(zip(one, other, strict=True))
    return next((i for i, (a, b) in pairs if a != b), len(one))
