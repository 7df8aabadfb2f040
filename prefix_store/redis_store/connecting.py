"""A client for each kind of address: one server, a cluster, or the master that sentinels know."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast
from urllib.parse import urlsplit, urlunsplit

from redis.asyncio import BlockingConnectionPool, Redis, RedisCluster, Sentinel
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import SSLConnection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import RedisClusterException, RedisError

from prefix_store.errors import StoreUnavailableError

URL_PATTERN = r"^(unix|rediss?(\+(cluster|sentinel))?)://"
FAILURES = (RedisError, RedisClusterException, OSError)
_MAX_CONNECTIONS = 32
_RETRIES = 3
_PORTS = {"cluster": 6379, "sentinel": 26379}


@dataclass(frozen=True, slots=True)
class Connected:
    """A client that connects on first use.

    Attributes:
        address: for messages, without user, password and query.
        timeout: most seconds that it waits for an answer.
        sentinel: to be closed too.
        url: what `connect` was given; it may hold a password.
    """

    client: Redis
    address: str
    timeout: float
    sentinel: Sentinel | None = None
    url: str = field(default="", repr=False)

    @asynccontextmanager
    async def reaching(self) -> AsyncIterator[None]:
        """A block that talks to the server.

        Raises:
            StoreUnavailableError: in place of whatever the client raises.
        """
        try:
            yield
        except FAILURES as error:
            raise StoreUnavailableError(
                f"the prefix store at {self.address} does not answer: {error}"
            ) from error

    async def close(self) -> None:
        """Close every connection."""
        await self.client.aclose()
        if self.sentinel is not None:
            await self.sentinel.aclose()


def connect(url: str, timeout: float, *, retries: int = _RETRIES) -> Connected:
    """A client for a `redis://`, `rediss://`, `unix://`, `redis+cluster://host:port,host:port` or
    `redis+sentinel://host:port,host:port/service/db` URL; `rediss+` where TLS is spoken.

    Args:
        timeout: most seconds to wait to connect, for each answer and for a free connection; a
            failed call is retried.
        retries: how often; three times take about a second.

    Raises:
        ValueError: not such a URL.
    """
    scheme, _, kind = urlsplit(url).scheme.partition("+")
    options: dict[str, Any] = {
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "retry": Retry(ExponentialWithJitterBackoff(cap=0.5, base=0.05), retries),
    }
    if kind == "cluster":
        return replace(_cluster(scheme, url, options), url=url)
    if kind == "sentinel":
        return replace(_sentinel(scheme, url, options), url=url)
    pool = BlockingConnectionPool.from_url(
        url, max_connections=_MAX_CONNECTIONS, timeout=timeout, **options
    )
    return Connected(Redis.from_pool(pool), _address(url), timeout, url=url)


def _cluster(scheme: str, url: str, options: dict[str, Any]) -> Connected:
    hosts, found = _hosts(scheme, url, "cluster", urlsplit(url).path)
    nodes = [ClusterNode(host, port) for host, port in hosts]
    client = RedisCluster(startup_nodes=nodes, **options, **found)
    # It has every command that the store uses, with the same results.
    return Connected(cast("Redis", client), _listed(hosts), options["socket_timeout"])


def _sentinel(scheme: str, url: str, options: dict[str, Any]) -> Connected:
    service, _, database = urlsplit(url).path.strip("/").partition("/")
    if not service:
        raise ValueError("no service; expected redis+sentinel://host:port/service")
    hosts, found = _hosts(scheme, url, "sentinel", f"/{database}")
    own = {
        name: found.pop(f"sentinel_{name}")
        for name in ("username", "password")
        if f"sentinel_{name}" in found
    }
    encryption = {name: value for name, value in found.items() if name.startswith("ssl")}
    sentinel = Sentinel(  # type: ignore[no-untyped-call]
        hosts, sentinel_kwargs={**options, **encryption, **own}
    )
    client = sentinel.master_for(service, **options, **found)
    address = f"{service} of {_listed(hosts)}"
    return Connected(client, address, options["socket_timeout"], sentinel)


def _hosts(
    scheme: str, url: str, kind: str, path: str
) -> tuple[list[tuple[str, int]], dict[str, Any]]:
    """The hosts, and what the rest of the URL says to the client."""
    parts = urlsplit(url)
    user, at, listed = parts.netloc.rpartition("@")
    hosts = []
    for netloc in listed.split(","):
        one = urlsplit(f"//{netloc}")
        if not one.hostname:
            raise ValueError(f"no host in {netloc!r}; expected redis+{kind}://host:port,host:port")
        hosts.append((one.hostname, one.port or _PORTS[kind]))
    found: dict[str, Any] = dict(
        parse_url(urlunsplit((scheme, f"{user}{at}host", path, parts.query, "")))
    )
    del found["host"]
    if found.pop("connection_class", None) is SSLConnection:
        found["ssl"] = True
    return hosts, found


def _listed(hosts: list[tuple[str, int]]) -> str:
    return ", ".join(f"{host}:{port}" for host, port in hosts)


def _address(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return parts.path
    return f"{parts.hostname or 'localhost'}:{parts.port or 6379}"
