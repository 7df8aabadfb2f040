"""API keys: make, list and revoke."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import replace

from prefix_store.api_key import ApiKey, Scope, is_key_id, kept_of, new_key_text
from prefix_store.errors import UnknownKeyError
from prefix_store.lookups import Lookups
from prefix_store.store import KeyStore
from prefix_store.tenant import DEFAULT_TENANT, check_tenant
from server.callers import Caller
from server.errors import ForbiddenError, InvalidRequestError


class KeyService:
    """What the routes ask about keys. The operator has every tenant's, others their own."""

    def __init__(
        self, store: KeyStore, known: Lookups[ApiKey], clock: Callable[[], float] = time.time
    ) -> None:
        """
        Args:
            known: kept current with `store`.
            clock: unix time, in seconds.
        """
        self._store = store
        self._known = known
        self._clock = clock

    async def create(
        self,
        caller: Caller,
        *,
        tenant: str | None,
        scopes: Collection[Scope],
        label: str,
        expires_in: float | None,
    ) -> tuple[str, ApiKey]:
        """A new key, which nobody can read again, and what is kept of it.

        Args:
            tenant: whose; None is the caller's own.
            expires_in: seconds until it is good no longer; None is never.

        Raises:
            InvalidTenantError, InvalidRequestError, ForbiddenError, StoreUnavailableError
        """
        tenant = check_tenant(caller.tenant if tenant is None else tenant)
        if tenant != caller.tenant and not caller.is_operator:
            raise ForbiddenError(
                f"key {caller.key_id} makes keys of the tenant {caller.tenant!r} only; leave "
                "tenant out, or ask the server's operator"
            )
        if Scope.METRICS in scopes and tenant != DEFAULT_TENANT:
            raise InvalidRequestError(
                f"the scope metrics is for keys of the tenant {DEFAULT_TENANT!r}: /metrics tells "
                "of every tenant"
            )
        now = self._clock()
        expires_at = None if expires_in is None else now + expires_in
        text = new_key_text()
        key = kept_of(text, tenant, scopes, label=label, now=now, expires_at=expires_at)

        def step(found: ApiKey | None) -> ApiKey:
            if found is not None:
                raise InvalidRequestError("two keys were given the same id; make another one")
            return key

        await self._store.change(key.key_id, step)
        self._known.forget(key.key_id)
        return text, key

    async def list(self, caller: Caller) -> list[ApiKey]:
        """The keys that the caller manages, by tenant and age.

        Raises:
            StoreUnavailableError
        """
        return [key for key in await self._store.list() if _manages(caller, key)]

    async def revoke(self, caller: Caller, key_id: str) -> ApiKey:
        """End a key for good: here at once, on every server within a second.

        Raises:
            UnknownKeyError: there is none, or the caller does not manage it.
            StoreUnavailableError
        """
        now = self._clock()

        def step(found: ApiKey | None) -> ApiKey:
            if found is None or not _manages(caller, found):
                raise UnknownKeyError(f"no API key {key_id[:80]!r}")
            return found if found.revoked_at is not None else replace(found, revoked_at=now)

        if not is_key_id(key_id):
            raise UnknownKeyError(f"no API key {key_id[:80]!r}")
        try:
            return await self._store.change(key_id, step)
        finally:
            self._known.forget(key_id)

    async def is_active(self, key_id: str) -> bool:
        """Whether a key is good now.

        Raises:
            StoreUnavailableError: the store is away and the key is not known here.
        """
        try:
            key = await self._known.get(key_id)
        except UnknownKeyError:
            return False
        return key.state(self._clock()) == "active"


def _manages(caller: Caller, key: ApiKey) -> bool:
    return caller.is_operator or key.tenant == caller.tenant
