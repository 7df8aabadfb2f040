"""From vLLM's outputs to the protocol's events, and from its figures to the protocol's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from vllm.v1.metrics.loggers import StatLoggerBase

from server.engine.checks import NOT_FINITE
from server.engine.protocol import (
    EngineFailedError,
    EngineStats,
    FinishReason,
    StepObserver,
    StepStats,
    TokenEvent,
    TokenLogprob,
)

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.v1.metrics.stats import IterationStats, SchedulerStats

_REASONS = {"stop": FinishReason.EOS_TOKEN, "length": FinishReason.LENGTH}


class Events:
    """One request's events."""

    def __init__(self, top_logprobs: int) -> None:
        self._top_logprobs = top_logprobs
        self._begun = False

    def of(self, output: RequestOutput) -> Iterator[TokenEvent]:
        """Events of what came since the last output.

        Raises:
            EngineFailedError: the request failed, or its numbers are not finite.
        """
        [completion] = output.outputs
        reason = completion.finish_reason
        if reason is not None and reason not in _REASONS:
            raise EngineFailedError("the step this request was in failed; try again")
        last = len(completion.token_ids) - 1
        for position, token_id in enumerate(completion.token_ids):
            chosen, top = self._logprobs(token_id, completion.logprobs[position])
            if not math.isfinite(chosen.logprob):
                raise EngineFailedError(NOT_FINITE)
            ends = reason is not None and position == last
            waited = None if self._begun else _queue_seconds(output.metrics)
            self._begun = True
            yield TokenEvent(chosen, top, _REASONS[reason] if ends else None, waited)

    def _logprobs(self, token_id: int, found: Any) -> tuple[TokenLogprob, tuple[TokenLogprob, ...]]:
        ranked = sorted(found.items(), key=lambda item: item[1].rank)
        top = [TokenLogprob(other, logprob.logprob) for other, logprob in ranked]
        return TokenLogprob(token_id, found[token_id].logprob), tuple(top[: self._top_logprobs])


def _queue_seconds(metrics: Any) -> float:
    return max(0.0, float(metrics.scheduled_ts - metrics.queued_ts))


class StepFigures(StatLoggerBase):
    """Hears of each of vLLM's steps, on the event loop, and tells the observer."""

    def __init__(self, stats: Callable[[], EngineStats], on_step: StepObserver) -> None:
        self._stats = stats
        self._on_step = on_step
        self._last = time.perf_counter()
        self.running = 0

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """See `StatLoggerBase.record`."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        if scheduler_stats is not None:
            self.running = scheduler_stats.num_running_reqs
        if iteration_stats is not None:
            prompts = len(iteration_stats.time_to_first_tokens_iter)
            self._on_step(
                StepStats(
                    decode_rows=iteration_stats.num_generation_tokens - prompts,
                    prefill_tokens=iteration_stats.prompt_token_stats.computed,
                    preempted=iteration_stats.num_preempted_reqs,
                    seconds=seconds,
                    stats=self._stats(),
                )
            )

    def log_engine_initialized(self) -> None:
        """See `StatLoggerBase.log_engine_initialized`."""
