"""What is known of the request that is being answered, wherever in the code that is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Timing:
    """A part of a request's work, from and to unix nanoseconds."""

    name: str
    start_ns: int
    end_ns: int
    attributes: Mapping[str, str | int] = field(default_factory=dict)


@dataclass(slots=True)
class RequestContext:
    """One request.

    Attributes:
        request_id: the client's own, or one made for it.
        facts: what its line in the log says, beside method, path, status and time.
        headers: what its answer says in its head, whatever the answer is.
        target: what it is about, for the audit log, beside what its path names.
        timings: of its parts; None while nobody traces it.
    """

    request_id: str
    facts: dict[str, object] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    target: dict[str, str] = field(default_factory=dict)
    timings: list[Timing] | None = None

    def add(self, name: str, count: int) -> None:
        """Count something for the log."""
        found = self.facts.get(name, 0)
        assert isinstance(found, int)  # noqa: S101 - facts that are counted are only counted
        self.facts[name] = found + count

    def longest(self, name: str, seconds: float) -> None:
        """Tell the log of a time, of which a request with several sequences has the longest."""
        found = self.facts.get(name, 0.0)
        assert isinstance(found, float)  # noqa: S101 - facts that are times are only times
        self.facts[name] = max(found, round(seconds, 4))

    def timed(self, name: str, start_ns: int, end_ns: int, **attributes: str | int) -> None:
        """Tell of a part of the work, if it is traced."""
        if self.timings is not None:
            self.timings.append(Timing(name, start_ns, end_ns, attributes))


_current: ContextVar[RequestContext | None] = ContextVar("request", default=None)


def current_request() -> RequestContext:
    """The request that is being answered; an unnamed one for work that no request asked for."""
    return _current.get() or RequestContext("")


@contextmanager
def answering(request: RequestContext) -> Iterator[None]:
    """In this block, and in the tasks it starts, this is the current request."""
    token = _current.set(request)
    try:
        yield
    finally:
        _current.reset(token)
