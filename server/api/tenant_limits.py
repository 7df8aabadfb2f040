"""What tenants and their keys may use; set by the server's operator."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path
from pydantic import Field

from server.accounting.limits import KeyLimits, TenantLimits
from server.api.dependencies import AdminCaller, ServicesDep
from server.api.schemas import AnswerModel
from server.callers import Caller
from server.errors import ForbiddenError

router = APIRouter(prefix="/admin", tags=["Limits"])

Tenant = Annotated[
    str,
    Path(
        description="The tenant's name.",
        pattern=r"^[a-z0-9][a-z0-9-]{0,62}$",
        examples=["acme"],
    ),
]
KeyId = Annotated[
    str,
    Path(
        description="The key's id, its public part.",
        pattern=r"^[A-Za-z0-9_-]{1,64}$",
        examples=["k3v9x2ab"],
    ),
]


class TenantLimitsAnswer(AnswerModel):
    """A tenant's limits."""

    tenant: str = Field(description="Its name.", examples=["acme"])
    limits: TenantLimits = Field(description="What is set for it.")
    effective: TenantLimits = Field(
        description="What holds: the server's default where nothing is set; null is no limit."
    )


class KeyLimitsAnswer(AnswerModel):
    """A key's own limits, beside those of its tenant."""

    tenant: str = Field(description="Whose key it is.", examples=["acme"])
    key_id: str = Field(description="The key's public part.", examples=["k3v9x2ab"])
    limits: KeyLimits = Field(description="What is set for it; what is not bounds nothing.")


@router.get("/limits", response_model_exclude_unset=True)
async def list_limits(caller: AdminCaller, services: ServicesDep) -> list[TenantLimitsAnswer]:
    """Every tenant for which limits are set; for others than the operator only the own one."""
    book = services.accounting.limiter.book
    if not caller.is_operator:
        return [await _tenant_answer(services, caller.tenant)]
    return [_tenant(services, tenant, limits) for tenant, limits in (await book.list()).items()]


@router.get("/tenants/{tenant}/limits", response_model_exclude_unset=True)
async def get_tenant_limits(
    tenant: Tenant, caller: AdminCaller, services: ServicesDep
) -> TenantLimitsAnswer:
    """A tenant's limits, as set and as they hold."""
    _check_own(caller, tenant)
    return await _tenant_answer(services, tenant)


@router.put("/tenants/{tenant}/limits", response_model_exclude_unset=True)
async def set_tenant_limits(
    tenant: Tenant, limits: TenantLimits, caller: AdminCaller, services: ServicesDep
) -> TenantLimitsAnswer:
    """Replace a tenant's limits, on every server within a second.

    What is left out is the server's default; null is no limit. `{}` is the defaults for all.
    """
    _check_operator(caller)
    await services.accounting.limiter.book.set(tenant, limits)
    return _tenant(services, tenant, limits)


@router.get("/tenants/{tenant}/keys/{key_id}/limits", response_model_exclude_unset=True)
async def get_key_limits(
    tenant: Tenant, key_id: KeyId, caller: AdminCaller, services: ServicesDep
) -> KeyLimitsAnswer:
    """What is set for one of a tenant's keys."""
    _check_own(caller, tenant)
    limits = await services.accounting.limiter.book.of_key(tenant, key_id)
    return KeyLimitsAnswer(tenant=tenant, key_id=key_id, limits=limits)


@router.put("/tenants/{tenant}/keys/{key_id}/limits", response_model_exclude_unset=True)
async def set_key_limits(
    tenant: Tenant,
    key_id: KeyId,
    limits: KeyLimits,
    caller: AdminCaller,
    services: ServicesDep,
) -> KeyLimitsAnswer:
    """Replace the limits of one of a tenant's keys; `{}` is none of its own."""
    _check_operator(caller)
    await services.accounting.limiter.book.set(tenant, limits, key_id)
    return KeyLimitsAnswer(tenant=tenant, key_id=key_id, limits=limits)


async def _tenant_answer(services: ServicesDep, tenant: str) -> TenantLimitsAnswer:
    limits = await services.accounting.limiter.book.of_tenant(tenant)
    return _tenant(services, tenant, limits)


def _tenant(services: ServicesDep, tenant: str, limits: TenantLimits) -> TenantLimitsAnswer:
    effective = services.accounting.limiter.book.effective(limits)
    # Every field of it is told, also those that bound nothing.
    whole = TenantLimits.model_validate(effective.model_dump())
    return TenantLimitsAnswer(tenant=tenant, limits=limits, effective=whole)


def _check_own(caller: Caller, tenant: str) -> None:
    if tenant != caller.tenant and not caller.is_operator:
        raise ForbiddenError(
            f"the key {caller.key_id} is of the tenant {caller.tenant!r}, and sees its limits only"
        )


def _check_operator(caller: Caller) -> None:
    if not caller.is_operator:
        raise ForbiddenError(
            f"limits are set by this server's operator, and the key {caller.key_id} is of the "
            f"tenant {caller.tenant!r}"
        )
