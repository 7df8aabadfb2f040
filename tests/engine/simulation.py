"""The scheduler on a simulated clock: no model is run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from server.engine.protocol import GenerationRequest, SamplingParams
from server.engine.scheduler import Scheduler, Span
from server.engine.sequence import Sequence


class Simulation:
    """Runs requests through a scheduler, and counts what each tenant is served on its own."""

    def __init__(
        self,
        max_slots: int,
        prefill_tokens: int = 16,
        seconds: Callable[[list[Span]], float] = lambda _: 1.0,
    ) -> None:
        """
        Args:
            seconds: how long a step takes.
        """
        self.now = 0.0
        self.scheduler = Scheduler(max_slots, prefill_tokens, clock=lambda: self.now)
        self.served: Counter[str] = Counter()
        self.preempted = 0
        self.finished: list[Sequence] = []
        self._seconds = seconds
        self._admitted: set[Sequence] = set()

    def ask(
        self,
        tenant: str,
        prompt: int = 4,
        new: int = 4,
        *,
        weight: float = 1.0,
        priority: int = 0,
        beams: int = 1,
        at: float | None = None,
    ) -> Sequence:
        """A request that arrives now, or came `at` a time in the last step."""
        request = GenerationRequest(
            "r",
            (1,) * prompt,
            SamplingParams(new, num_beams=beams),
            tenant=tenant,
            weight=weight,
            priority=priority,
        )
        sequence = Sequence(request, prefix=None, arrived_at=self.now if at is None else at)
        self.scheduler.add(sequence)
        return sequence

    def waiting(self, tenant: str) -> int:
        """Requests of a tenant that wait."""
        return sum(s.request.tenant == tenant for s in self.scheduler.waiting)

    def holds(self, tenant: str) -> int:
        """Slots of a tenant."""
        return sum(s.request.tenant == tenant for s in self.scheduler.running)

    def step(self) -> Counter[str]:
        """Admit, and give every sequence that is ready a token.

        Returns:
            how many tokens of each tenant's prompts were computed.
        """
        admission = self.scheduler.admit()
        self.preempted += admission.preempted
        self._check_that_nobody_could_be_admitted()
        lost = [sequence for sequence in self.scheduler.waiting if sequence.was_preempted]
        for sequence in (*admission.sequences, *lost):  # one may lose its slot as soon as it has it
            if sequence not in self._admitted and not sequence.is_sibling:
                self.served[sequence.request.tenant] += len(sequence.request.prompt_ids)
            self._admitted.add(sequence)
        prefilled: Counter[str] = Counter()
        spans = self.scheduler.plan()
        for span in spans:
            if span.start < span.sequence.prefill_end:
                prefilled[span.sequence.request.tenant] += span.num_tokens
            span.sequence.length = span.end
            if span.completes_prompt:
                self._token(span.sequence)
        seconds = self._seconds(spans)
        self.scheduler.observe(spans, seconds)
        self.now += seconds
        return prefilled

    def _token(self, sequence: Sequence) -> None:
        started = not sequence.output_ids and not sequence.is_sibling
        for beam in sequence.beams if started else (sequence,):
            beam.output_ids.append(1)
            beam.length = sequence.length
            self.served[sequence.request.tenant] += 2
        ended = len(sequence.output_ids) == sequence.request.sampling.max_new_tokens
        if ended and not sequence.is_sibling:
            self.finished.append(sequence)
            self._admitted.difference_update(sequence.beams)
            self.scheduler.remove(sequence)

    def _check_that_nobody_could_be_admitted(self) -> None:
        """Free slots are left only where those whose turn it is need more."""
        if self.scheduler.waiting:
            free = self.scheduler.max_slots - len(self.scheduler.running)
            assert len(self.scheduler.waiting.first.beams) > free
