"""What is known of a batch and of a file, as it lies on the disk."""

from __future__ import annotations

import re
import secrets
import time
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field

from server.callers import Caller, Scope

_ID = re.compile(r"(file|batch)-[0-9a-f]{32}")


class Status(StrEnum):
    """Where a batch is, in OpenAI's words."""

    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def is_final(self) -> bool:
        """Whether nothing more happens to it."""
        return self in _FINAL


_FINAL = {Status.COMPLETED, Status.FAILED, Status.CANCELLED, Status.EXPIRED}


class FileRecord(BaseModel):
    """A file.

    Attributes:
        filename: what its owner calls it; told, and never used as a path.
        created_at: in unix seconds.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    tenant: str
    filename: str
    purpose: str
    bytes: int
    created_at: int


class Counts(BaseModel):
    """Lines of a batch: all, those answered, and those in the error file."""

    model_config = ConfigDict(frozen=True)

    total: int = Field(default=0, description="All lines.", examples=[3])
    completed: int = Field(default=0, description="Those answered with 200.", examples=[2])
    failed: int = Field(default=0, description="Those in the error file.", examples=[1])


class BatchRecord(BaseModel):
    """A batch.

    Attributes:
        tenant, key_id, scopes: whose it is; see `Caller`.
        output_id, error_id: the files that its results go to, whether there are any yet.
        expires_at: what is not done by then is left undone, in unix seconds.
        times: when it came to each status, in unix seconds.
        counts: of a batch that has ended; what runs is counted by the runner.
        failure: why it failed.
        has_output, has_errors: whether those files exist for its owner.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    tenant: str
    key_id: str | None
    scopes: frozenset[Scope]
    endpoint: str
    input_id: str
    output_id: str
    error_id: str
    expires_at: int
    metadata: dict[str, str] | None = None
    status: Status = Status.VALIDATING
    times: dict[Status, int]
    counts: Counts = Counts()
    failure: str | None = None
    has_output: bool = False
    has_errors: bool = False

    @property
    def caller(self) -> Caller:
        """Who asked for it."""
        return Caller(self.tenant, self.key_id, self.scopes)

    @property
    def created_at(self) -> int:
        """In unix seconds."""
        return self.times[Status.VALIDATING]

    def at(self, status: Status, **changes: object) -> BatchRecord:
        """The batch, come to a status now."""
        times = {**self.times, status: now()}
        return self.model_copy(update={"status": status, "times": times, **changes})


def new_id(kind: str) -> str:
    """An unguessable name for a `file` or a `batch`."""
    return f"{kind}-{secrets.token_hex(16)}"


def is_id(text: str) -> bool:
    """Whether it is such a name, and so may be part of a path."""
    return _ID.fullmatch(text) is not None


def now() -> int:
    """In unix seconds."""
    return int(time.time())
