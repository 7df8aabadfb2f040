"""Whose turn it is: the Virtual Token Counter.

Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024), algorithm 2, with weights.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator

from server.engine.account import INPUT_COST, Account
from server.engine.sequence import Sequence

_REMEMBERED = 1024


class FairQueue:
    """Sequences that wait. Priorities are strict; within one, who was served least goes first.

    A tenant's own sequences keep the order in which they came, so with one tenant this is first
    come, first served. Each priority has counters of its own: what a tenant was served at a low
    one, out of what others left, is not held against it at a high one.

    A tenant that had nothing waiting is lifted to the least counter of those that have, so that
    nobody saves up turns. For two tenants that always have something waiting at one priority, what
    they are served in any interval, divided by their weights, differs by at most
    `2 * max(INPUT_COST * L, OUTPUT_COST * M) / min(weight)`: `L` tokens in the longest prompt and
    `M` positions in all slots.
    """

    def __init__(self) -> None:
        self._accounts: dict[tuple[int, str], Account] = {}
        self._lines: dict[Account, deque[Sequence]] = {}  # none is empty
        self._last_to_leave: dict[int, Account] = {}
        self._remembered: dict[tuple[int, str], Account] = {}

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Sequence]:
        """Everything that waits, in no order."""
        return (sequence for line in self._lines.values() for sequence in line)

    @property
    def accounts(self) -> Collection[Account]:
        """Of tenants with anything that waits or runs."""
        return self._accounts.values()

    @property
    def first(self) -> Sequence:
        """Whose turn it is, if anything waits. Among equals, who holds fewest slots."""
        return min((line[0] for line in self._lines.values()), key=_turn)

    def append(self, sequence: Sequence) -> None:
        """Queue a sequence that is new."""
        request = sequence.request
        key = (request.priority, request.tenant)
        account = self._accounts.get(key)
        if account is None:
            account = self._remembered.pop(key, None) or Account(request.tenant, request.priority)
            self._accounts[key] = account
        account.weight = request.weight
        account.live += 1
        for beam in sequence.beams:
            beam.account = account
        self._line(account).append(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Queue a sequence, the newest of its tenant's that ran, before those that never ran."""
        self._line(sequence.account).appendleft(sequence)

    def take(self, sequence: Sequence) -> None:
        """Take out a sequence that is to have its slots, and charge its prompt the first time."""
        self._lines[sequence.account].remove(sequence)
        self._close_if_empty(sequence.account)
        if not sequence.was_preempted:
            sequence.account.charge(INPUT_COST * len(sequence.request.prompt_ids))

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that waits and will not come back."""
        self._lines[sequence.account].remove(sequence)
        self._close_if_empty(sequence.account)
        self.ended(sequence)

    def ended(self, sequence: Sequence) -> None:
        """A sequence neither waits nor runs any more."""
        account = sequence.account
        account.live -= 1
        if account.live:
            return
        key = (account.priority, account.tenant)
        self._remembered[key] = self._accounts.pop(key)
        if len(self._remembered) > _REMEMBERED:
            del self._remembered[next(iter(self._remembered))]

    def _line(self, account: Account) -> deque[Sequence]:
        line = self._lines.get(account)
        if line is None:
            account.served = max(account.served, self._floor(account.priority))
            line = self._lines[account] = deque()
        return line

    def _floor(self, priority: int) -> float:
        """The counter that one who has nothing waiting is lifted to."""
        waiting = [account.served for account in self._lines if account.priority == priority]
        if waiting:
            return min(waiting)
        last = self._last_to_leave.get(priority)
        return 0.0 if last is None else last.served

    def _close_if_empty(self, account: Account) -> None:
        if not self._lines[account]:
            del self._lines[account]
            self._last_to_leave[account.priority] = account


def _turn(sequence: Sequence) -> tuple[int, float, float, float]:
    account = sequence.account
    held = account.slots / account.weight
    return -account.priority, account.served, held, sequence.arrived_at
