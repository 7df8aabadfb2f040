"""How many sequences each tenant may have here, running and waiting."""

from __future__ import annotations

from collections import Counter

from server.engine.protocol import GenerationRequest, QueueFullError


class Places:
    """A bound on the sequences held, each beam being one, which no tenant uses up for the others.

    While there are free places anybody may have them. When there are none, a tenant that has fewer
    than an equal share still gets more of them: only who would have more than that is refused. So n
    tenants have at most `limit * (1 + 1/2 + ... + 1/n)` together, and one alone has `limit`.
    """

    def __init__(self, max_slots: int, max_waiting: int) -> None:
        self._limit = max_slots + max_waiting
        self._max_waiting = max_waiting
        self._requests: dict[str, GenerationRequest] = {}
        self._held: Counter[str] = Counter()

    def check(self, tenant: str, sequences: int) -> None:
        """Would a tenant have places for so many now?

        Raises:
            QueueFullError: it would not.
        """
        held = self._held[tenant]
        tenants = len(self._held.keys() | {tenant})
        is_full = self._held.total() + sequences > self._limit
        if is_full and held + sequences > self._limit / tenants:
            yours = f" {held} of those here are yours;" if tenants > 1 else ""
            raise QueueFullError(
                f"the queue is full: {self._max_waiting} sequences may wait, each beam being one;"
                f"{yours} try again in a moment"
            )

    def take(self, request: GenerationRequest) -> None:
        """Keep places for a request.

        Raises:
            QueueFullError: there are none for its tenant.
        """
        beams = request.sampling.num_beams
        self.check(request.tenant, beams)
        self._held[request.tenant] += beams
        self._requests[request.request_id] = request

    def give_back(self, request_id: str) -> None:
        """A request is not here any more."""
        request = self._requests.pop(request_id)
        self._held[request.tenant] -= request.sampling.num_beams
        if not self._held[request.tenant]:
            del self._held[request.tenant]
