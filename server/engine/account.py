"""What a tenant has been served, by which its next turn is decided."""

from __future__ import annotations

from dataclasses import dataclass

INPUT_COST = 1
OUTPUT_COST = 2


@dataclass(slots=True, eq=False)
class Account:
    """One tenant's at one priority.

    A token of a prompt costs `INPUT_COST`, a generated one `OUTPUT_COST`, as in the paper. A prefix
    costs nothing: it is neither computed nor generated, only attended to.

    Attributes:
        weight: its share beside that of others; > 0.
        served: the virtual token counter: what all its tokens cost, divided by its weight.
        slots: how many its sequences hold, one for each beam.
        live: requests that wait or run.
        last_prefill: a number that grows with each chunk of a prompt given to anybody.
        quiet_at: when it last had nothing that waits.
    """

    tenant: str
    priority: int
    weight: float = 1.0
    served: float = 0.0
    slots: int = 0
    live: int = 0
    last_prefill: int = 0
    quiet_at: float = 0.0

    def charge(self, cost: int) -> None:
        """Count what it is served."""
        self.served += cost / self.weight
