"""Make, list and revoke API keys."""

from __future__ import annotations

import time
from typing import Annotated, Literal

from fastapi import APIRouter, Path
from pydantic import Field

from prefix_store.api_key import ApiKey
from server.api.dependencies import AdminCaller, ServicesDep
from server.api.parameters import RequestModel
from server.api.schemas import AnswerModel
from server.callers import Scope
from server.request_context import current_request

_MAX_LABEL_CHARS = 100
_TEN_YEARS = 10 * 366 * 86_400
_KEY_ID_EXAMPLE = "5f0c21d9a3be"

router = APIRouter(prefix="/admin/keys", tags=["Keys"])


class KeyRequest(RequestModel):
    """A key to be made."""

    tenant: str | None = Field(
        default=None,
        description="Whose. Default: the caller's own; another needs the operator's key.",
        examples=["acme"],
    )
    scopes: list[Annotated[Scope, Field(strict=False)]] = Field(
        min_length=1,
        max_length=len(Scope),
        description="`generate`: generate texts. `admin`: change the tenant's tasks and keys. "
        "`metrics`: read /metrics, for the tenant `default` only.",
        examples=[["generate"]],
    )
    label: str = Field(
        default="",
        max_length=_MAX_LABEL_CHARS,
        description="What it is for, in any words.",
        examples=["website"],
    )
    expires_in: float | None = Field(
        default=None,
        gt=0,
        le=_TEN_YEARS,
        description="Seconds until it is good no longer. Default: never.",
        examples=[86_400],
    )


class KeyResponse(AnswerModel):
    """What is known of a key."""

    key_id: str = Field(
        description="Its public part, which lists and logs name it by.", examples=[_KEY_ID_EXAMPLE]
    )
    tenant: str = Field(description="Whose it is.", examples=["acme"])
    scopes: list[Scope] = Field(description="What it allows.", examples=[["generate"]])
    label: str = Field(description="What it is for.", examples=["website"])
    state: Literal["active", "expired", "revoked"] = Field(
        description="Whether it is good.", examples=["active"]
    )
    created_at: float = Field(description="In unix seconds.", examples=[1767225600.0])
    expires_at: float | None = Field(
        description="In unix seconds; null is never.", examples=[1767312000.0]
    )


class NewKeyResponse(KeyResponse):
    """A key, for the only time."""

    key: str = Field(
        description="What to send as `Authorization: Bearer`. Only its hash is kept.",
        examples=[f"ps-{_KEY_ID_EXAMPLE}-WmFyYXRodXN0cmEgc3BlYWtzIG9uY2Ugb25seS4uLi4"],
    )


@router.post("", status_code=201)
async def create(body: KeyRequest, services: ServicesDep, caller: AdminCaller) -> NewKeyResponse:
    """Make a key. This answer is the only place where it can be read."""
    text, key = await services.keys.create(
        caller,
        tenant=body.tenant,
        scopes=body.scopes,
        label=body.label,
        expires_in=body.expires_in,
    )
    current_request().target.update(tenant=key.tenant, key_id=key.key_id)
    return NewKeyResponse(key=text, **_answer(key).model_dump())


@router.get("")
async def list_keys(services: ServicesDep, caller: AdminCaller) -> list[KeyResponse]:
    """Every key of the tenant, the operator's caller every tenant's; also those good no longer."""
    return [_answer(key) for key in await services.keys.list(caller)]


@router.delete("/{key_id}")
async def revoke(
    key_id: Annotated[str, Path(description="Its public part.", examples=[_KEY_ID_EXAMPLE])],
    services: ServicesDep,
    caller: AdminCaller,
) -> KeyResponse:
    """End a key for good, on every server within a second. Requests that run go on."""
    return _answer(await services.keys.revoke(caller, key_id))


def _answer(key: ApiKey) -> KeyResponse:
    return KeyResponse(
        key_id=key.key_id,
        tenant=key.tenant,
        scopes=sorted(key.scopes),
        label=key.label,
        state=key.state(time.time()),
        created_at=key.created_at,
        expires_at=key.expires_at,
    )
