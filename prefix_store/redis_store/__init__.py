"""The prefix store on any server that speaks Redis' protocol; `docs/store.md` has the layout."""

from prefix_store.redis_store.store import RedisPrefixStore

__all__ = ["RedisPrefixStore"]
