"""What the server answers, as immutable values. Fields that a newer server adds are ignored."""

from __future__ import annotations

from datetime import date, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class Token(_Answer):
    """A generated token.

    Attributes:
        text: what it adds to the text; empty while a character is incomplete.
        logprob: natural logarithm of its probability, before penalties and sampling.
        special: true for tokens such as the end of text, which are not in `generated_text`.
    """

    id: int
    text: str
    logprob: float
    special: bool


class StreamDetails(_Answer):
    """How a generation went.

    Attributes:
        finish_reason: `length` when max_new_tokens were generated, `eos_token` when the model
            ended the text, `stop_sequence` when a stop string appeared.
        generated_tokens: number of tokens generated.
        seed: what sampling was seeded with; None for greedy decoding.
        task_id: None for the bare base model.
        version: the prefix that was used, `sha256:` and the digest of its bytes; None without one.
        prefix_tokens: positions that prefix takes.
        prompt_tokens: tokens of the input in the task's template.
    """

    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    generated_tokens: int
    seed: int | None
    task_id: str | None
    version: str | None
    prefix_tokens: int
    prompt_tokens: int


class Details(StreamDetails):
    """How a generation went, token by token.

    Attributes:
        tokens: every generated token.
        top_tokens: with `top_n_tokens`, for each position the likeliest tokens, likeliest first.
    """

    tokens: tuple[Token, ...]
    top_tokens: tuple[tuple[Token, ...], ...] = ()


class Generation(_Answer):
    """A finished text; `version`, `prefix_tokens` and `prompt_tokens` as in its details."""

    generated_text: str
    task_id: str | None
    version: str | None
    prefix_tokens: int
    prompt_tokens: int
    details: Details


class StreamToken(_Answer):
    """One token of a stream.

    Attributes:
        index: the token's number, from 1.
        top_tokens: with `top_n_tokens`, the likeliest tokens here, likeliest first.
        generated_text, details: on the last token only.
    """

    index: int
    token: Token
    top_tokens: tuple[Token, ...] = ()
    generated_text: str | None = None
    details: StreamDetails | None = None


class Task(_Answer):
    """A task and the prefix it points at.

    Attributes:
        version: `sha256:` and the hex digest of the stored artefact's bytes.
        prefix_length: positions the prefix takes.
        bytes: size of the artefact.
        method: how the prefix was made, e.g. `prefix-tuning`, `cartridge`, `text`.
        base_model: the base model it was made for, as its maker names it; may be empty.
        template: text around each input, `{source}` where the input goes; empty for the input
            as it is.
        created_at: when it was uploaded, in UTC.
        split: percent of the requests by version; empty when all go to `version`.
        shared_with: the other tenants that may use it; only `public` for all of them.
    """

    task_id: str
    version: str
    prefix_length: int
    bytes: int
    method: str
    base_model: str
    template: str
    created_at: datetime
    split: dict[str, int] = {}
    shared_with: tuple[str, ...] = ()


class TaskCount(_Answer):
    """How many tasks the tenant has."""

    tasks: int


class Version(_Answer):
    """One version of a task.

    Attributes:
        version: `sha256:` and the hex digest of the artefact's bytes.
        active: requests get it by default.
        percent: share of the requests that get it.
        prefix_length, bytes, method, base_model: as in `Task`.
        created_at: when the task was given it, in UTC.
    """

    version: str
    active: bool
    percent: int
    prefix_length: int
    bytes: int
    method: str
    base_model: str
    created_at: datetime


class File(_Answer):
    """A file on the server; `bytes` is its size."""

    id: str
    filename: str
    purpose: str
    bytes: int


class BatchCounts(_Answer):
    """Requests of a batch: all, those answered, and those in the error file."""

    total: int
    completed: int
    failed: int


class BatchFailure(_Answer):
    """Why a batch failed."""

    message: str


class BatchFailures(_Answer):
    """Why a batch failed, as a list."""

    data: tuple[BatchFailure, ...]


class Batch(_Answer):
    """A file of requests that the server answers when it has time.

    Attributes:
        output_file_id, error_file_id: of its results once it has ended; None where there are none.
        errors: why it failed.
    """

    id: str
    endpoint: str
    input_file_id: str
    status: Literal[
        "validating",
        "in_progress",
        "finalizing",
        "completed",
        "failed",
        "cancelling",
        "cancelled",
        "expired",
    ]
    output_file_id: str | None
    error_file_id: str | None
    request_counts: BatchCounts
    errors: BatchFailures | None

    @property
    def has_ended(self) -> bool:
        """Whether nothing more happens to it."""
        return self.status in ("completed", "failed", "cancelled", "expired")


class Key(_Answer):
    """An API key, without what only its holder knows.

    Attributes:
        key_id: its public part.
        scopes: what it allows: `generate`, `admin`, `metrics`.
        label: what it is for.
        created_at, expires_at: in UTC; None is never.
    """

    key_id: str
    tenant: str
    scopes: tuple[str, ...]
    label: str
    state: Literal["active", "expired", "revoked"]
    created_at: datetime
    expires_at: datetime | None


class NewKey(Key):
    """A key that was just made; nobody can ask for `key` again."""

    key: str


class TenantLimits(_Answer):
    """What a tenant may use; docs/limits.md has the names.

    Attributes:
        limits: what is set for it.
        effective: what holds: the server's default where nothing is set; None is no limit.
    """

    tenant: str
    limits: dict[str, int | float | None]
    effective: dict[str, int | float | None]


class KeyLimits(_Answer):
    """What is set for one API key, beside its tenant's limits."""

    tenant: str
    key_id: str
    limits: dict[str, int | float | None]


class UsageRow(_Answer):
    """What a tenant used of a task on a day (UTC).

    Attributes:
        task_id: None is the bare base model.
        sequences: texts begun; each input of a call is one.
    """

    day: date
    tenant: str
    task_id: str | None
    sequences: int
    prompt_tokens: int
    prefix_tokens: int
    generated_tokens: int


class Health(_Answer):
    """Whether the server takes requests now, and if not, why."""

    ready: bool
    reason: str = ""


class ServerInfo(_Answer):
    """What the server runs.

    Attributes:
        model_id: the base model.
        model_sha: fingerprint of its weights; a prefix made for this model carries it.
        model_dtype, model_device_type: what it computes in and on.
        num_layers, num_kv_heads, head_dim: sizes of a prefix.
        max_total_tokens: limit of prefix + prompt + max_new_tokens.
        version: of the server.
    """

    model_id: str
    model_sha: str
    model_dtype: str
    model_device_type: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_total_tokens: int
    version: str
