"""Counts what callers use, for all who want to know: limits, usage, metrics and the log."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from server.accounting.limiter import Admission, Limiter
from server.accounting.usage import UsageLedger
from server.accounting.usage_types import Quantity
from server.callers import Caller
from server.metrics import Metrics
from server.request_context import RequestContext, current_request

_KINDS = {
    Quantity.PROMPT_TOKENS: "prompt",
    Quantity.PREFIX_TOKENS: "prefix",
    Quantity.GENERATED_TOKENS: "generated",
}


@dataclass(frozen=True, slots=True)
class Accounting:
    """Where it is counted."""

    limiter: Limiter
    ledger: UsageLedger
    metrics: Metrics

    @asynccontextmanager
    async def call(self, caller: Caller, sequences: int) -> AsyncIterator[CallAccount]:
        """Account for a call of so many sequences, from before it begins until it has ended.

        Raises:
            LimitExceededError, InvalidRequestError: see `Limiter.admit`.
        """
        admission = await self.limiter.admit(caller, sequences)
        call = CallAccount(self, caller, admission, [0] * sequences)
        try:
            yield call
        finally:
            admission.close(call.used)


@dataclass(frozen=True, slots=True)
class CallAccount:
    """A call that was let in.

    Attributes:
        used: of each sequence, tokens until now, prompt and generated.
    """

    accounting: Accounting
    caller: Caller
    admission: Admission
    used: list[int]

    @property
    def max_new_tokens(self) -> int | None:
        """Most that a sequence may be asked to generate."""
        return self.admission.allowance.max_new_tokens

    @property
    def weight(self) -> float:
        """The tenant's, for the scheduler."""
        return self.admission.allowance.tenant.weight

    async def reserve(self, tokens: Sequence[int]) -> None:
        """Hold the most that each sequence may use. See `Admission.reserve`."""
        await self.admission.reserve(tokens)

    def sequence(
        self, index: int, task_id: str | None, prompt_tokens: int, prefix_tokens: int
    ) -> SequenceAccount:
        """Account for one of the sequences.

        Args:
            prompt_tokens, prefix_tokens: 0 where another sequence of the same prompt counts them.
        """
        return SequenceAccount(self, index, task_id, prompt_tokens, prefix_tokens)


class SequenceAccount:
    """One sequence. It counts from its first token on, and each token as it is handed on.

    So what a client is told is what is counted; of a client that goes away, what was handed on
    until the server noticed.
    """

    def __init__(
        self,
        call: CallAccount,
        index: int,
        task_id: str | None,
        prompt_tokens: int,
        prefix_tokens: int,
    ) -> None:
        self._call = call
        self._index = index
        self._task_id = task_id
        self._prompt_tokens = prompt_tokens
        self._prefix_tokens = prefix_tokens
        self._request: RequestContext = current_request()
        metrics = call.accounting.metrics
        label = metrics.tenants.known(call.caller.tenant)
        self._counters = {
            quantity: metrics.tenant_tokens.labels(label, kind) for quantity, kind in _KINDS.items()
        }
        self._has_begun = False

    def token(self) -> None:
        """Count one generated token."""
        self.begun()
        self._call.used[self._index] += 1
        self._count(Quantity.GENERATED_TOKENS, 1)

    def begun(self) -> None:
        """Its prompt is computed: count it, once."""
        if self._has_begun:
            return
        self._has_begun = True
        self._call.admission.started(self._index)
        self._call.used[self._index] += self._prompt_tokens
        self._count(Quantity.SEQUENCES, 1)
        self._count(Quantity.PROMPT_TOKENS, self._prompt_tokens)
        self._count(Quantity.PREFIX_TOKENS, self._prefix_tokens)

    async def finished(self) -> None:
        """Its last token came; return when the next request can have its place."""
        await self._call.admission.finished(self._index, self._call.used[self._index])

    def _count(self, quantity: Quantity, count: int) -> None:
        call = self._call
        call.accounting.ledger.add(call.caller.tenant, self._task_id, quantity, count)
        self._request.add(quantity.value, count)
        if quantity in self._counters:
            self._counters[quantity].inc(count)
