"""What a tenant, and each of its keys, may use."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field

MOST = 2**53
"""Every double up to here is a whole number, in Lua and in every JSON client."""

Limit = Annotated[int, Field(strict=True, ge=1, le=MOST)] | None


class KeyLimits(BaseModel):
    """What requests may use. A limit that is None bounds nothing; one not given is the default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests_per_minute: Limit = Field(
        default=None, description="Calls that generate, in any 60 seconds.", examples=[60]
    )

    tokens_per_minute: Limit = Field(
        default=None,
        description="Prompt and generated tokens, in any 60 seconds; a call counts when it begins.",
        examples=[100_000],
    )

    concurrent_requests: Limit = Field(
        default=None,
        description="Sequences that wait or run at once; each input of a call is one.",
        examples=[16],
    )

    queued_requests: Limit = Field(
        default=None, description="Of these, sequences that have no first token yet.", examples=[32]
    )

    max_new_tokens: Limit = Field(
        default=None, description="Largest `max_new_tokens` of a request.", examples=[512]
    )

    def over(self, defaults: Self) -> Self:
        """These, and the defaults where none is given."""
        return defaults.model_copy(update=self.model_dump(exclude_unset=True))


class TenantLimits(KeyLimits):
    """What all of a tenant's keys may use together, what it may store, and its share."""

    stored_bytes: Limit = Field(
        default=None,
        description="Bytes of all kept versions of its tasks.",
        examples=[1_000_000_000],
    )

    tasks: Limit = Field(default=None, description="Number of its tasks.", examples=[100])

    prefix_tokens: Limit = Field(
        default=None, description="Longest prefix, in positions.", examples=[256]
    )

    weight: float = Field(
        default=1.0,
        gt=0,
        le=1000,
        allow_inf_nan=False,
        description="Its share of the model where tenants wait for each other.",
        examples=[2.0],
    )
