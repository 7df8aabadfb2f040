"""Who gives up a slot, where a tenant below its share would wait for one."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

from server.engine.account import Account
from server.engine.sequence import Sequence


def victims(
    head: Sequence, running: Iterable[Sequence], accounts: Collection[Account], max_slots: int
) -> list[Sequence]:
    """Sequences that make room for `head`, whose turn it is; none where that is not enough.

    Lower priorities give up what they hold. At the head's own priority, a tenant's share of the
    slots is by weight among those that have anything here, at least one slot; those over it give
    up the rest to a tenant that stays within its own. So nobody who yielded can take it back at
    once. The newest yield first: they have the least to compute again, and the oldest go on. A
    beam search never yields.
    """
    spare = _spare(head, accounts, max_slots)
    missing = len(head.beams) - (max_slots - sum(account.slots for account in accounts))
    if sum(spare.values()) < missing:
        return []
    found: list[Sequence] = []
    for sequence in sorted(running, key=lambda s: (s.account.priority, -s.arrived_at)):
        if spare.get(sequence.account, 0) and not sequence.is_beam:
            spare[sequence.account] -= 1
            found.append(sequence)
            if len(found) == missing:
                return found
    return []


def _spare(head: Sequence, accounts: Collection[Account], max_slots: int) -> dict[Account, int]:
    """How many slots each account would have to give up."""
    mine = head.account
    peers = [account for account in accounts if account.priority == mine.priority]
    weights = sum(account.weight for account in peers)
    share = {account: max(1.0, max_slots * account.weight / weights) for account in peers}
    spare = {account: account.slots for account in accounts if account.priority < mine.priority}
    if mine.slots + len(head.beams) <= share[mine]:
        spare |= {peer: max(0, math.ceil(peer.slots - share[peer])) for peer in peers}
    return spare
