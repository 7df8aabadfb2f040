"""API keys: how one is made and recognised, and what is kept of it.

A key is `ps-<key id>-<secret>`. The key id names it in lists and logs. The secret is 256 random
bits, which nobody can guess, so a plain SHA-256 of the key is enough to keep: there is nothing that
a slow hash would slow down.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

_SECRET_BYTES = 32
_KEY_ID_BYTES = 6
_KEY_ID = re.compile(r"[a-z0-9]{1,16}")
_TEXT = re.compile(rb"ps-([a-z0-9]{1,16})-[A-Za-z0-9_-]{43}")


class Scope(StrEnum):
    """What a key allows."""

    GENERATE = "generate"
    ADMIN = "admin"
    METRICS = "metrics"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is kept of a key.

    Attributes:
        key_id: its public part.
        digest: SHA-256 of the whole key, in hex.
        label: what it is for, in any words.
        created_at, expires_at, revoked_at: in unix seconds; None is never.
    """

    key_id: str
    digest: str
    tenant: str
    scopes: frozenset[Scope]
    label: str
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None

    def matches(self, text: bytes) -> bool:
        """Whether this is the key, in a time that does not tell how much of it is right."""
        return hmac.compare_digest(digest_of(text), self.digest)

    def state(self, now: float) -> Literal["active", "expired", "revoked"]:
        """Whether it is good at this time, in unix seconds."""
        if self.revoked_at is not None:
            return "revoked"
        if self.expires_at is not None and self.expires_at <= now:
            return "expired"
        return "active"


def new_key_text(key_id: str | None = None) -> str:
    """A new key, of a new id if none is given."""
    key_id = key_id or secrets.token_hex(_KEY_ID_BYTES)
    return f"ps-{key_id}-{secrets.token_urlsafe(_SECRET_BYTES)}"


def kept_of(
    text: str,
    tenant: str,
    scopes: Iterable[Scope],
    *,
    label: str,
    now: float,
    expires_at: float | None = None,
) -> ApiKey:
    """What is kept of a key; times in unix seconds."""
    data = text.encode()
    key_id = key_id_of(data)
    if key_id is None:
        raise ValueError("not a key of new_key_text's")
    return ApiKey(key_id, digest_of(data), tenant, frozenset(scopes), label, now, expires_at)


def key_id_of(text: bytes) -> str | None:
    """The id of what may be a key; None where it cannot be one."""
    match = _TEXT.fullmatch(text)
    return None if match is None else match[1].decode()


def is_key_id(key_id: str) -> bool:
    """Whether a key may have this id."""
    return _KEY_ID.fullmatch(key_id) is not None


def digest_of(text: bytes) -> str:
    """What `ApiKey.digest` is for this key."""
    return hashlib.sha256(text).hexdigest()
