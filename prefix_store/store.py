"""What a prefix store does, whatever keeps the bytes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from prefix_store.api_key import ApiKey
from prefix_store.artefact import Artefact
from prefix_store.condition import ALWAYS, Condition
from prefix_store.quota import NO_QUOTA, Quota
from prefix_store.task import Task, TaskRecord

__all__ = ["Audit", "Changes", "KeyStore", "PrefixStore", "Subscription", "Task", "TaskRecord"]


@dataclass(frozen=True, slots=True)
class Changes:
    """What changed in the store.

    Attributes:
        position: where in the store's history this is; give it back to hear what came later.
        task_ids, key_ids: the tasks and the API keys that changed, or None when that is no longer
            known: any may have.
        sharing: whether what is shared with whom may have changed.
    """

    position: str
    task_ids: tuple[str, ...] | None
    key_ids: tuple[str, ...] | None
    sharing: bool


@dataclass(frozen=True, slots=True)
class Audit:
    """What the store's own books say, read at one moment.

    Attributes:
        tasks: by name.
        unreadable: names of tasks whose stored text is damaged.
        unreferenced: versions, or blobs of them, with bytes that no task keeps and nothing will
            delete.
        miscounted: versions whose number of tasks on record is wrong.
        mislisted: names of tasks for which the list of shared ones is wrong.
        missized: names of tasks whose size on record, for quotas, is wrong.
        unreadable_keys: ids of API keys whose stored text is damaged.
    """

    tasks: tuple[Task, ...]
    unreadable: tuple[str, ...]
    unreferenced: tuple[str, ...]
    miscounted: tuple[str, ...]
    mislisted: tuple[str, ...]
    missized: tuple[str, ...]
    unreadable_keys: tuple[str, ...]


class Subscription(Protocol):
    """Woken by every change while the connection holds."""

    async def wait(self, seconds: float) -> None:
        """Return at the next change, or after so many seconds."""


class KeyStore(Protocol):
    """API keys, the revoked ones too, so that none comes back.

    Every method raises StoreUnavailableError when the store does not answer.
    """

    async def get(self, key_id: str) -> ApiKey:
        """The key now.

        Raises:
            UnknownKeyError: no key of this id.
        """

    async def list(self) -> list[ApiKey]:
        """Every key, by tenant and age."""

    async def change(self, key_id: str, step: Callable[[ApiKey | None], ApiKey]) -> ApiKey:
        """Make of a key, None where there is none, what `step` says; what it raises is raised.

        Args:
            step: called again when another change came in between.
        """


class PrefixStore(Protocol):
    """Tasks and the artefacts they point at. Equal artefacts are kept once.

    A task's name here is `task_id.stored_name`'s: which tenants there are, and who may do what, is
    for others to know.

    Every change of a task is whole or not at all, and seen whole. Every method raises
    StoreUnavailableError when the store does not answer. Methods that change a task take a
    condition on its active version and raise PreconditionFailedError where it does not hold.
    """

    @property
    def keys(self) -> KeyStore:
        """The API keys, in the same store and the same log of changes."""

    async def put(
        self,
        task_id: str,
        artefact: Artefact,
        *,
        activate: bool = True,
        condition: Condition = ALWAYS,
        quota: Quota = NO_QUOTA,
    ) -> TaskRecord:
        """Give `task_id` another version.

        Args:
            activate: make it the active one and end a split; else the task must exist.
            quota: what its tenant may store; looked at in the step that makes the change.

        Raises:
            InvalidTaskIdError: `check_stored_name` refuses the name.
            UnknownTaskError: no task of this name, and `activate` is false.
            QuotaExceededError: its tenant would store more than it may.
        """

    async def restore(
        self, task: Task, artefacts: Sequence[Artefact], condition: Condition = ALWAYS
    ) -> None:
        """Make a task be exactly this, in one step, in place of what has its name.

        Args:
            artefacts: one of each version that it keeps.

        Raises:
            InvalidTaskIdError: `check_stored_name` refuses the name.
        """

    async def activate(self, task_id: str, version: str, condition: Condition = ALWAYS) -> Task:
        """Make a kept version the active one and end a split.

        Raises:
            UnknownTaskError, UnknownVersionError
        """

    async def rollback(self, task_id: str, condition: Condition = ALWAYS) -> Task:
        """Activate again what was active before, and end a split.

        Raises:
            UnknownTaskError: no task of this name.
            VersionConflictError: nothing was, or it is not kept any more.
        """

    async def split(
        self, task_id: str, shares: Mapping[str, int], condition: Condition = ALWAYS
    ) -> Task:
        """Divide the task's requests among kept versions, in percent; nothing ends a split.

        Raises:
            UnknownTaskError, UnknownVersionError
            InvalidSplitError: the shares are not from 1 to 100 or do not add to 100.
        """

    async def pin(self, task_id: str, pinned: bool, condition: Condition = ALWAYS) -> Task:
        """Have every server keep the task's prefix loaded, or no longer.

        Raises:
            UnknownTaskError: no task of this name.
        """

    async def share(
        self, task_id: str, tenants: Sequence[str], condition: Condition = ALWAYS
    ) -> Task:
        """Let these tenants use the task and no others; `public` is all, nothing is none.

        Raises:
            UnknownTaskError: no task of this name.
            InvalidTenantError
        """

    async def delete_version(
        self, task_id: str, version: str, condition: Condition = ALWAYS
    ) -> Task:
        """Forget one version of a task.

        Raises:
            UnknownTaskError, UnknownVersionError
            VersionConflictError: it is active or has a share of the requests.
        """

    async def delete(self, task_id: str, condition: Condition = ALWAYS) -> None:
        """Forget the task, and the artefacts that no other task keeps.

        Raises:
            UnknownTaskError: no task of this name.
        """

    async def get(self, task_id: str) -> Task:
        """The task now.

        Raises:
            UnknownTaskError: no task of this name.
        """

    async def page(self, tenant: str, limit: int, after: str) -> list[Task]:
        """The tenant's first tasks by name, at most so many, whose names come after this one."""

    async def count(self, tenant: str | None = None) -> int:
        """How many tasks there are, or how many of a tenant."""

    async def pinned(self) -> list[Task]:
        """Every pinned task."""

    async def list(self, tenant: str | None = None) -> list[Task]:
        """Every task, or every task of a tenant, by name."""

    async def shared(self) -> Mapping[str, frozenset[str]]:
        """The tenants that each shared task is shared with; `public` is all."""

    async def size(self, version: str) -> int:
        """Bytes of the artefact.

        Raises:
            UnknownVersionError: no task keeps it any more.
        """

    async def read(self, version: str) -> bytearray:
        """The artefact's bytes, one buffer filled as they come.

        Raises:
            UnknownVersionError: no task keeps it any more.
            CorruptArtefactError: the bytes do not hash to `version`.
        """

    def stream(self, version: str, start: int, stop: int) -> AsyncGenerator[bytes]:
        """The artefact's bytes from `start` to before `stop`, in pieces of at most some MB.

        Raises:
            UnknownVersionError: no task keeps it any more.
            CorruptArtefactError: bytes are missing; or, when all are asked for, they do not hash
                to `version`: before the last piece then.
        """

    async def changes(self, since: str | None) -> Changes:
        """What changed after a position, or where the store is now if `since` is None."""

    def subscribe(self) -> AbstractAsyncContextManager[Subscription]:
        """Hear of changes as they happen."""

    async def collect(self) -> int:
        """Delete what interrupted uploads and dropped versions left behind; how many artefacts."""

    async def audit(self) -> Audit:
        """Check the store's own books; the artefacts' bytes are not read.

        What uploads under way and interrupted ones left is in order: it goes by itself.
        """

    async def ping(self) -> None:
        """Return if the store answers."""

    async def close(self) -> None:
        """Close every connection."""
