"""What a prefix store does, whatever keeps the bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from prefix_store.prefix import Prefix


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """What a task points at.

    Attributes:
        version: `sha256:` and the hex digest of the artefact's bytes.
        prefix_length: positions the prefix takes.
        nbytes: size of the artefact in bytes.
        method, base_model, template: as in `Prefix`.
        created_at: when the task was last put, in unix seconds.
    """

    task_id: str
    version: str
    prefix_length: int
    nbytes: int
    method: str
    base_model: str
    template: str
    created_at: float


class PrefixStore(Protocol):
    """Tasks and the artefacts they point at. Equal artefacts are kept once.

    Every method raises StoreUnavailableError when the store does not answer.
    """

    async def put(self, task_id: str, prefix: Prefix) -> TaskRecord:
        """Make `task_id` point at `prefix`: all of it or, on an error, nothing.

        Raises:
            InvalidTaskIdError: `check_task_id` refuses the name.
        """

    async def get(self, task_id: str) -> TaskRecord:
        """What the task points at.

        Raises:
            UnknownTaskError: no task of this name.
        """

    async def read(self, version: str) -> bytes:
        """The artefact's bytes, as `Prefix.to_bytes` made them.

        Raises:
            UnknownVersionError: no task points at it any more.
            CorruptArtefactError: the bytes do not hash to `version`.
        """

    async def list(self) -> list[TaskRecord]:
        """Every task, by name."""

    async def delete(self, task_id: str) -> None:
        """Forget the task, and its artefact unless another task points at it.

        Raises:
            UnknownTaskError: no task of this name.
        """

    async def ping(self) -> None:
        """Return if the store answers."""

    async def close(self) -> None:
        """Close every connection."""
