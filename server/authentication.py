"""From the header of a request to its caller (RFC 6750)."""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Sequence

from prefix_store.api_key import ApiKey, key_id_of
from prefix_store.errors import UnknownKeyError
from prefix_store.lookups import Lookups
from server.callers import ANYBODY, Caller
from server.errors import AuthenticationError

Authenticate = Callable[[Sequence[bytes]], Awaitable[Caller]]
"""The caller by every Authorization header of a request; raises AuthenticationError."""

_BEARER = re.compile(rb"bearer +(\S+)", re.IGNORECASE)
_HOW = "send Authorization: Bearer and an API key"


async def anybody(_: Sequence[bytes]) -> Caller:
    """Without authentication, whatever the header says."""
    return ANYBODY


class Authenticator:
    """Recognises API keys."""

    def __init__(self, keys: Lookups[ApiKey], clock: Callable[[], float] = time.time) -> None:
        """
        Args:
            keys: by key id, kept current with the store.
            clock: unix time, in seconds.
        """
        self._keys = keys
        self._clock = clock

    async def __call__(self, authorization: Sequence[bytes]) -> Caller:
        """The caller by every Authorization header of a request.

        Raises:
            AuthenticationError: no key, or none that is good.
            StoreUnavailableError: the store is away and the key is not known here.
        """
        text = _key_text(authorization)
        key_id = key_id_of(text)
        try:
            key = None if key_id is None else await self._keys.get(key_id)
        except UnknownKeyError:
            key = None
        if key is None or not key.matches(text):
            raise AuthenticationError(f"this is not an API key of this server; {_HOW}")
        state = key.state(self._clock())
        if state != "active":
            raise AuthenticationError(f"the API key {key.key_id} is {state}; ask for a new one")
        return Caller(key.tenant, key.key_id, key.scopes)


def _key_text(authorization: Sequence[bytes]) -> bytes:
    if not authorization:
        raise AuthenticationError(f"there is no Authorization header; {_HOW}")
    # Two of them may be read one way here and another way by a proxy in front.
    if len(authorization) > 1:
        raise AuthenticationError(f"there are {len(authorization)} Authorization headers; {_HOW}")
    match = _BEARER.fullmatch(authorization[0].strip(b" \t"))
    if match is None:
        raise AuthenticationError(f"the Authorization header is not Bearer and one word; {_HOW}")
    return match[1]
