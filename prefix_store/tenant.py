"""Who owns tasks and API keys, by name."""

from __future__ import annotations

import re

from prefix_store.errors import InvalidTenantError

DEFAULT_TENANT = "default"
"""Who owns what was stored without a tenant, and whose administrators operate the server."""
PUBLIC = "public"
"""Every tenant, where tenants are listed; no tenant's name."""

_ALLOWED = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_SHOWN = 40


def check_tenant(tenant: str) -> str:
    """`tenant` itself, if it is a tenant's name.

    Raises:
        InvalidTenantError: empty, over 63 characters, other characters than lower-case ASCII
            letters, digits and `-`, beginning with `-`, or `public`.
    """
    if _ALLOWED.fullmatch(tenant) and tenant != PUBLIC:
        return tenant
    shown = tenant if len(tenant) <= _SHOWN else f"{tenant[:_SHOWN]}… ({len(tenant)} characters)"
    raise InvalidTenantError(
        f"the tenant is {shown!r}; expected 1 to 63 lower-case letters, digits or '-', beginning "
        f"with a letter or digit, and not {PUBLIC!r}"
    )
