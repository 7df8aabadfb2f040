"""How much a tenant may store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prefix_store.errors import QuotaExceededError


@dataclass(frozen=True, slots=True)
class Quota:
    """Bounds on what a tenant stores; None is no bound.

    Attributes:
        nbytes: of all versions that its tasks keep, each task's on its own.
        tasks: how many.
    """

    nbytes: int | None = None
    tasks: int | None = None

    def check(self, tenant: str, name: str, size: int, stored: Mapping[str, int]) -> None:
        """Refuse a task of so many bytes beside what is stored, unless it shrinks.

        Args:
            stored: bytes of each of the tenant's tasks, this one as it was.

        Raises:
            QuotaExceededError
        """
        had = stored.get(name)
        if had is None and self.tasks is not None and len(stored) >= self.tasks:
            raise self.too_many_tasks(tenant)
        total = sum(stored.values()) - (had or 0) + size
        if self.nbytes is not None and size > (had or 0) and total > self.nbytes:
            raise self.too_many_bytes(tenant, total)

    def too_many_tasks(self, tenant: str) -> QuotaExceededError:
        """For a task over the number."""
        return QuotaExceededError(
            f"the tenant {tenant!r} has {self.tasks} tasks, the most that it may have; delete some"
        )

    def too_many_bytes(self, tenant: str, total: int) -> QuotaExceededError:
        """For an upload after which it would store so many."""
        return QuotaExceededError(
            f"with this upload the tenant {tenant!r} would store {total} bytes, and it may store "
            f"{self.nbytes}; delete tasks, or versions that no request uses"
        )


NO_QUOTA = Quota()
