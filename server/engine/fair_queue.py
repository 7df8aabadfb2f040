"""Whose turn it is: the Virtual Token Counter.

Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024), algorithm 2, with weights.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from itertools import islice

from server.engine.account import INPUT_COST, Account
from server.engine.sequence import Sequence

_REMEMBERED = 1024
_EXPECTED_SECONDS = 60.0


class FairQueue:
    """Sequences that wait. Priorities are strict; within one, who was served least goes first.

    A tenant's own sequences keep the order in which they came, so with one tenant this is first
    come, first served. Each priority has counters of its own: what a tenant was served at a low
    one, out of what others left, is not held against it at a high one.

    A tenant that had nothing waiting is lifted towards the counters of those that have, so that
    nobody saves up turns. It keeps a head start: what those that hold slots were served there until
    now, as if it had come before them. So several requests at once of a tenant below its share do
    not wait for turns. For two tenants that always have something waiting at one priority, what
    they are served in any interval, divided by their weights, still differs by at most
    `2 * max(INPUT_COST * L, OUTPUT_COST * M) / min(weight)`: `L` tokens in the longest prompt and
    `M` positions in all slots.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._accounts: dict[tuple[int, str], Account] = {}
        self._lines: dict[Account, deque[Sequence]] = {}  # none is empty
        self._last_to_leave: dict[int, Account] = {}
        self._remembered: dict[tuple[int, str], Account] = {}  # who left last is the last
        self._clock = clock

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
    def expects_others(self) -> bool:
        """May somebody come who would not wait for turns?

        A tenant beside others that has nothing waiting, or had nothing a short while ago; or one
        that left then.
        """
        lately = self._clock() - _EXPECTED_SECONDS
        if len(self._accounts) > 1:
            return any(not self.has(one) or one.quiet_at > lately for one in self.accounts)
        return any(one.quiet_at > lately for one in islice(reversed(self._remembered.values()), 1))

    def has(self, account: Account) -> bool:
        """Does anything of a tenant wait?"""
        return account in self._lines

    @property
    def first(self) -> Sequence:
        """Whose turn it is, if anything waits. Among equals, who holds fewest slots."""
        return min((line[0] for line in self._lines.values()), key=_turn)

    def append(self, sequence: Sequence, served_in_slots: int = 0) -> None:
        """Queue a sequence that is new.

        Args:
            served_in_slots: what everybody's sequences that have slots now were served until now.
        """
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
        self._line(account, served_in_slots / account.weight).append(sequence)

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
        account.quiet_at = self._clock()
        key = (account.priority, account.tenant)
        self._remembered[key] = self._accounts.pop(key)
        if len(self._remembered) > _REMEMBERED:
            del self._remembered[next(iter(self._remembered))]

    def _line(self, account: Account, head_start: float = 0.0) -> deque[Sequence]:
        line = self._lines.get(account)
        if line is None:
            account.quiet_at = self._clock()
            account.served = max(account.served, self._floor(account.priority, head_start))
            line = self._lines[account] = deque()
        return line

    def _floor(self, priority: int, head_start: float) -> float:
        """The counter that one who has nothing waiting is lifted to.

        So far below the greatest, or at the least: whichever is less.
        """
        waiting = [account.served for account in self._lines if account.priority == priority]
        if waiting:
            return min(*waiting, max(waiting) - head_start)
        last = self._last_to_leave.get(priority)
        return 0.0 if last is None else last.served - head_start

    def _close_if_empty(self, account: Account) -> None:
        if not self._lines[account]:
            del self._lines[account]
            self._last_to_leave[account.priority] = account


def _turn(sequence: Sequence) -> tuple[int, float, float, float]:
    account = sequence.account
    held = account.slots / account.weight
    return -account.priority, account.served, held, sequence.arrived_at
