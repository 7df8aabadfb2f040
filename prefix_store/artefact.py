"""A prefix with its bytes, ready to be stored under their hash."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from prefix_store.prefix import Prefix, version_of
from prefix_store.task import TaskRecord
from prefix_store.tensor_file import Buffer


@dataclass(frozen=True, slots=True, eq=False)
class Artefact:
    """A valid prefix as it will be stored.

    Attributes:
        prefix: what the bytes hold; its tensors may be views of them.
        data: the bytes, in memory or of a file.
        version: `version_of(data)`.
    """

    prefix: Prefix
    data: Buffer
    version: str

    @classmethod
    def of(cls, prefix: Prefix) -> Self:
        """A prefix made here, written out in memory."""
        data = prefix.to_bytes()
        return cls(prefix, data, version_of(data))

    def record(self, task_id: str, created_at: float) -> TaskRecord:
        """A task at this version since `created_at`, in unix seconds."""
        return TaskRecord(
            task_id=task_id,
            version=self.version,
            prefix_length=self.prefix.prefix_length,
            nbytes=len(self.data),
            method=self.prefix.method,
            base_model=self.prefix.base_model,
            template=self.prefix.template,
            created_at=created_at,
            groups=tuple(self.prefix.groups),
        )
