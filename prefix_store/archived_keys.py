"""API keys as an export has them: their hashes, as the store has."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from prefix_store.api_key import ApiKey, Scope, is_key_id
from prefix_store.errors import ArchiveError, InvalidTenantError
from prefix_store.tenant import check_tenant

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@checked_dataclass(frozen=True, config=_STRICT)
class _SavedKey:
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    tenant: str
    scopes: frozenset[Scope]
    label: str
    created_at: float
    expires_at: float | None
    revoked_at: float | None


_SAVED_KEY = TypeAdapter(_SavedKey)


def saved_keys(keys: Iterable[ApiKey]) -> dict[str, dict[str, Any]]:
    """The keys as JSON has them, by key id."""
    saved = {}
    for key in keys:
        saved[key.key_id] = asdict(key) | {"scopes": sorted(key.scopes)}
        del saved[key.key_id]["key_id"]
    return saved


def restored_keys(saved: Mapping[str, object]) -> list[ApiKey]:
    """The keys again.

    Raises:
        ArchiveError: what is saved is no key.
    """
    keys = []
    for key_id, entry in saved.items():
        try:
            found = _SAVED_KEY.validate_json(json.dumps(entry))
            check_tenant(found.tenant)
        except (ValidationError, InvalidTenantError) as error:
            raise ArchiveError(f"the export's API key {key_id[:80]!r} is damaged") from error
        if not is_key_id(key_id):
            raise ArchiveError(f"the export's API key {key_id[:80]!r} has an id that none has")
        keys.append(ApiKey(key_id=key_id, **vars(found)))
    return keys
