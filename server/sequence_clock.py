"""What the metrics are told of one sequence."""

from __future__ import annotations

import time

from server.engine.protocol import GenerationRequest, TokenEvent
from server.metrics import Metrics, SplitSequence


class SequenceClock:
    """Measures one sequence."""

    def __init__(
        self, metrics: Metrics, label: str, started: float, request: GenerationRequest
    ) -> None:
        self._metrics = metrics
        self._started = started
        self._last: float | None = None
        self._generated = metrics.generated_tokens.labels(label)
        self._compared: SplitSequence | None = None
        self._queue_seconds = metrics.queue_seconds.labels(metrics.tenants.known(request.tenant))
        # The tokens of a search come at once when it ends: there is no time between them.
        self._one_by_one = request.sampling.num_beams == 1
        metrics.prompt_tokens.labels(label).inc(len(request.prompt_ids))

    def compare(self, sequence: SplitSequence) -> None:
        """Count it for its version of a split task, too."""
        self._compared = sequence

    def token(self, event: TokenEvent) -> None:
        """A token came."""
        now = time.perf_counter()
        if event.queue_seconds is not None:
            self._queue_seconds.observe(event.queue_seconds)
        if self._last is None:
            self._metrics.ttft_seconds.observe(now - self._started)
        elif self._one_by_one:
            self._metrics.itl_seconds.observe(now - self._last)
        self._last = now
        self._generated.inc()
        if self._compared is not None:
            self._compared.tokens.inc()

    def finished(self) -> None:
        """The last one did."""
        seconds = time.perf_counter() - self._started
        self._metrics.e2e_seconds.observe(seconds)
        if self._compared is not None:
            self._compared.seconds.observe(seconds)
