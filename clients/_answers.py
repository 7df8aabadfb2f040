"""What the server answers, as immutable values. Fields a newer server adds are ignored."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class Token(_Answer):
    """A token and its log-probability under the base model with its prefix."""

    id: int
    text: str
    logprob: float | None
    special: bool


class Details(_Answer):
    """How a generation went.

    Attributes:
        finish_reason: `length`, `eos_token` or `stop_sequence`.
        generated_tokens: number of tokens generated.
        seed: what sampling was seeded with; None for greedy decoding.
        tokens: every generated token; empty at the end of a stream, which gave them one by one.
        top_tokens: for each generated token the `top_n_tokens` likeliest ones.
    """

    finish_reason: str
    generated_tokens: int
    seed: int | None = None
    tokens: tuple[Token, ...] = ()
    top_tokens: tuple[tuple[Token, ...], ...] = ()


class Generation(_Answer):
    """A finished text.

    Attributes:
        version: the prefix that was used, `sha256:` and the digest of its bytes; None without one.
        prefix_tokens: length of that prefix, 0 without one.
        prompt_tokens: tokens of the input.
    """

    generated_text: str
    details: Details | None = None
    task_id: str | None = None
    version: str | None = None
    prefix_tokens: int = 0
    prompt_tokens: int = 0


class StreamToken(_Answer):
    """One token of a stream; the last one also has `generated_text` and `details`."""

    token: Token
    top_tokens: tuple[Token, ...] = ()
    generated_text: str | None = None
    details: Details | None = None


class Task(_Answer):
    """A task the server knows.

    Attributes:
        version: `sha256:` and the hex digest of the prefix's bytes.
        prefix_length: positions the prefix takes.
        bytes: size of the artefact.
        method: how the prefix was made, e.g. `prefix-tuning`, `cartridge`, `text`.
    """

    task_id: str
    version: str
    prefix_length: int
    bytes: int
    method: str


class Health(_Answer):
    """Whether the server takes requests now, and if not, why."""

    ready: bool
    reason: str = ""


class ServerInfo(_Answer):
    """What the server runs."""

    model_id: str
