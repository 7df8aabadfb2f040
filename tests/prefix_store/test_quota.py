"""What a tenant stores is bounded in the step that stores it."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from prefix_store.artefact import Artefact
from prefix_store.errors import QuotaExceededError
from prefix_store.quota import Quota
from prefix_store.redis_store import RedisPrefixStore, layout
from tests.prefix_store.examples import an_artefact

ARTEFACTS = [an_artefact(seed) for seed in range(12)]
SIZE = max(len(artefact.data) for artefact in ARTEFACTS)


async def put(store: RedisPrefixStore, task_id: str, artefact: Artefact, quota: Quota) -> bool:
    """Whether it was stored."""
    try:
        await store.put(task_id, artefact, quota=quota)
    except QuotaExceededError:
        return False
    return True


@pytest.mark.parametrize("quota", [Quota(tasks=3), Quota(nbytes=3 * SIZE)], ids=str)
async def test_uploads_at_once_do_not_slip_under_a_quota_together(
    store: RedisPrefixStore, redis: Redis, quota: Quota
) -> None:
    stored = await asyncio.gather(
        *(put(store, f"acme/{n}", artefact, quota) for n, artefact in enumerate(ARTEFACTS))
    )
    assert sum(stored) == 3
    assert len(await store.list("acme")) == 3
    assert await put(store, "other/task", ARTEFACTS[0], quota)  # a tenant of its own
    await store.collect()
    assert await redis.hlen(layout.BLOBS) == len({task.version for task in await store.list()})
    assert not await redis.exists(layout.PENDING, layout.GARBAGE)


async def test_a_tenant_over_its_quota_may_shrink_and_keep_what_it_has(
    store: RedisPrefixStore,
) -> None:
    first, second, third = ARTEFACTS[:3]
    sizes = [len(one.data) for one in (first, second, third)]
    assert await put(store, "acme/a", first, Quota())
    assert await put(store, "acme/a", second, Quota())
    tight = Quota(nbytes=1, tasks=1)
    assert not await put(store, "acme/a", third, tight)
    assert not await put(store, "acme/b", first, tight)
    assert await put(store, "acme/a", second, tight)  # nothing more than it has
    await store.rollback("acme/a")
    await store.delete_version("acme/a", second.version)
    exact = Quota(nbytes=sizes[0] + sizes[2], tasks=1)
    assert await put(store, "acme/a", third, exact)
    await store.delete("acme/a")
    assert await put(store, "acme/b", first, exact)


async def test_the_error_says_how_much(store: RedisPrefixStore) -> None:
    size = len(ARTEFACTS[0].data)
    with pytest.raises(QuotaExceededError, match=f"'acme' would store {size} bytes.* {size - 1};"):
        await store.put("acme/a", ARTEFACTS[0], quota=Quota(nbytes=size - 1))
    await store.put("acme/a", ARTEFACTS[0])
    with pytest.raises(QuotaExceededError, match="'acme' has 1 tasks"):
        await store.put("acme/b", ARTEFACTS[0], quota=Quota(tasks=1))


async def test_a_store_from_before_is_measured_once(store: RedisPrefixStore, redis: Redis) -> None:
    await store.put("acme/a", ARTEFACTS[0])
    await store.put("acme/b", ARTEFACTS[1])
    await store.put("mine", ARTEFACTS[2])
    books = [layout.stored("acme"), layout.stored("default")]
    expected = [await redis.hgetall(book) for book in books]
    await redis.delete(*books)
    await redis.hset(layout.TASKS, "damaged", "{")
    await store.measure()
    assert [await redis.hgetall(book) for book in books] == expected
    assert not await put(store, "acme/c", ARTEFACTS[3], Quota(tasks=2))
    await redis.delete(*books)
    await store.measure()
    assert not await redis.exists(*books)
