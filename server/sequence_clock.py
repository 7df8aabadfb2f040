"""Measures one sequence, for metrics and traces."""

from __future__ import annotations

import time

from server.engine.protocol import GenerationRequest, TokenEvent
from server.metrics import Metrics, SplitSequence
from server.request_context import current_request


class SequenceClock:
    """From a sequence's submission to its end."""

    def __init__(
        self,
        metrics: Metrics,
        label: str,
        started: float,
        request: GenerationRequest,
        *,
        prompt_tokens: int,
    ) -> None:
        """
        Args:
            label: of its task.
            started: when its request came, by `time.perf_counter`.
            prompt_tokens: 0 where another sequence of the same prompt counts them.
        """
        self._metrics = metrics
        self._started = started
        self._last: float | None = None
        self._generated = metrics.generated_tokens.labels(label)
        self._compared: SplitSequence | None = None
        self._queue_seconds = metrics.queue_seconds.labels(metrics.tenants.known(request.tenant))
        # The tokens of a search come at once when it ends: there is no time between them.
        self._one_by_one = request.sampling.num_beams == 1
        self._request = current_request()
        self._submitted_ns = time.time_ns()
        self._first_ns: int | None = None
        self._prompt = metrics.prompt_tokens.labels(label)
        self._prompt_tokens = prompt_tokens

    def compare(self, sequence: SplitSequence) -> None:
        """Count it for its version of a split task, too."""
        self._compared = sequence

    def queued(self, seconds: float) -> None:
        """It has waited so long for a slot, and its prompt is computed."""
        self._prompt.inc(self._prompt_tokens)
        self._queue_seconds.observe(seconds)
        self._request.longest("queue_seconds", seconds)
        self._tell_start(seconds)

    def token(self, event: TokenEvent) -> None:
        """It has another token."""
        now = time.perf_counter()
        if event.queue_seconds is not None:
            self.queued(event.queue_seconds)
        if self._last is None:
            self._metrics.ttft_seconds.observe(now - self._started)
        elif self._one_by_one:
            self._metrics.itl_seconds.observe(now - self._last)
        self._last = now
        self._generated.inc()
        if self._compared is not None:
            self._compared.tokens.inc()

    def finished(self) -> None:
        """That was its last one."""
        seconds = time.perf_counter() - self._started
        self._metrics.e2e_seconds.observe(seconds)
        if self._compared is not None:
            self._compared.seconds.observe(seconds)

    def ended(self) -> None:
        """It is over, finished or not."""
        if self._first_ns is not None:
            self._request.timed("decode", self._first_ns, time.time_ns())

    def _tell_start(self, queue_seconds: float) -> None:
        self._first_ns = now = time.time_ns()
        admitted = min(self._submitted_ns + int(queue_seconds * 1e9), now)
        self._request.timed("queue", self._submitted_ns, admitted)
        self._request.timed("prefill", admitted, now)
