"""How safe an external server keeps what it acknowledges: wait for more, warn of less."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from redis.asyncio import Redis, RedisCluster
from redis.exceptions import ResponseError

from prefix_store.errors import StoreUnavailableError
from prefix_store.redis_store import layout

_BARRIER_SECONDS = 60
_PART = 0.8  # so that the server's answer comes before the client gives up
_SETTINGS = ("maxmemory-policy", "appendonly", "save")


@dataclass(frozen=True, slots=True)
class Wait:
    """What a change waits for before it is acknowledged, beside the server's own answer.

    Attributes:
        replicas: so many replicas have it.
        aof: it is on the disk, of the server and of these replicas (`WAITAOF`, Redis 7.2).
    """

    replicas: int = 0
    aof: bool = False

    def __bool__(self) -> bool:
        return self.replicas > 0 or self.aof

    async def confirm(self, client: Redis, seconds: float) -> None:
        """Return when everything written until now is as safe as asked for.

        Args:
            seconds: how long the client waits for an answer.

        Raises:
            StoreUnavailableError: it is not, after so long.
        """
        if not self:
            return
        milliseconds = int(seconds * _PART * 1000)
        # The server waits for what this connection wrote last, and other connections wrote before.
        async with client.pipeline(transaction=False) as pipeline:
            pipeline.set(layout.BARRIER, "", ex=_BARRIER_SECONDS)
            if self.aof:
                pipeline.execute_command("WAITAOF", 1, self.replicas, milliseconds)
            else:
                pipeline.execute_command("WAIT", self.replicas, milliseconds)
            _, answer = await pipeline.execute()
        disks, replicas = answer if self.aof else (0, answer)
        if replicas < self.replicas or disks < self.aof:
            on_disk = f", {'' if disks else 'not '}on the disk" if self.aof else ""
            raise StoreUnavailableError(
                f"the change was made, but {replicas} of {self.replicas} replicas have confirmed "
                f"it{on_disk} after {milliseconds} ms; it may still be lost: repeat it"
            )


NO_WAIT = Wait()


async def risks(client: Redis) -> tuple[str, ...]:
    """What the server's settings could lose, in words for its operator."""
    try:
        if isinstance(client, RedisCluster):
            found = await client.config_get(*_SETTINGS, target_nodes=RedisCluster.PRIMARIES)
            nodes = list(found.values())
        else:
            nodes = [cast("dict[str, str]", await client.config_get(*_SETTINGS))]
    except ResponseError:
        return ()  # CONFIG is not for everyone
    return tuple(dict.fromkeys(risk for node in nodes for risk in _risks_of(node)))


def _risks_of(settings: Mapping[str, str]) -> list[str]:
    found = []
    policy = settings.get("maxmemory-policy", "")
    if policy.startswith("allkeys"):
        found.append(
            f"its maxmemory-policy is {policy}, which drops prefixes when memory is full; set it "
            "to noeviction"
        )
    if settings.get("appendonly") == "no":
        kept = settings.get("save")
        found.append(
            f"its appendonly is no and it only writes snapshots (save {kept}), so a crash loses "
            "the uploads since the last one; set appendonly to yes"
            if kept
            else "its appendonly is no and its save is empty, so a restart loses every prefix; "
            "set appendonly to yes"
        )
    return found
