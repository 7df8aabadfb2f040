"""Who sends a request, and what they may do."""

from __future__ import annotations

from dataclasses import dataclass

from prefix_store.api_key import Scope
from prefix_store.tenant import DEFAULT_TENANT

__all__ = ["ANYBODY", "Caller", "Scope"]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request.

    Attributes:
        tenant: whose tasks they are, and who is accounted for the work.
        key_id: the public part of the API key, to be named in logs; None without authentication.
    """

    tenant: str
    key_id: str | None
    scopes: frozenset[Scope]

    @property
    def is_operator(self) -> bool:
        """Whether they run the server: an administrator of the default tenant."""
        return self.tenant == DEFAULT_TENANT and Scope.ADMIN in self.scopes

    def may(self, scope: Scope) -> bool:
        """Whether they may do what needs the scope; metrics tell of every tenant."""
        if scope is Scope.METRICS:
            return self.is_operator or (self.tenant == DEFAULT_TENANT and scope in self.scopes)
        return scope in self.scopes


ANYBODY = Caller(DEFAULT_TENANT, None, frozenset(Scope))
"""Every caller of a server without authentication."""
