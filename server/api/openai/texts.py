"""The text of one sequence as OpenAI's clients read it."""

from __future__ import annotations

from collections.abc import Sequence

from server.chunks import Chunk
from server.engine.protocol import FinishReason

# What other servers tell of a token that cannot come; JSON has no infinity.
_LEAST_LOGPROB = -9999.0


class TextWithoutStop:
    """Leaves the stop string out, and so holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, chunk: Chunk) -> str:
        """What a chunk adds to the text."""
        text = self._held + ("" if chunk.token.special else chunk.token.text)
        if chunk.finish is None:
            kept = len(text) - self._held_back(text)
        elif chunk.finish.reason is FinishReason.STOP_SEQUENCE:
            kept = len(text) - self._stop_at_end(text)
        else:
            kept = len(text)
        self._held = text[kept:]
        return text[:kept]

    def _held_back(self, text: str) -> int:
        """Characters at the end that a stop string may begin with."""
        longest = min(len(text), max(map(len, self._stops), default=1) - 1)
        ends = (text[-size:] for size in range(longest, 0, -1))
        return next((len(e) for e in ends if any(s.startswith(e) for s in self._stops)), 0)

    def _stop_at_end(self, text: str) -> int:
        return max((len(stop) for stop in self._stops if text.endswith(stop)), default=0)


def json_logprob(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, _LEAST_LOGPROB)
