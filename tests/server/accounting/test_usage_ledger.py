"""Usage reaches Redis once, whatever is lost on the way."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator
from datetime import date, timedelta
from pathlib import Path

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from prefix_store.embedded import EmbeddedValkey
from prefix_store.errors import StoreUnavailableError
from prefix_store.redis_store.connecting import connect
from server.accounting.usage import UsageLedger
from server.accounting.usage_store import UsageStore
from server.accounting.usage_types import Batch, Entry, Quantity, UsageRow

DAY = date(2026, 3, 31)
GENERATED = Quantity.GENERATED_TOKENS


class LosesAnswers(UsageStore):
    """Every other answer is lost after the server has done its work."""

    calls = 0

    async def apply(self, batch: Batch) -> None:
        await super().apply(batch)
        self.calls += 1
        if self.calls % 2:
            raise StoreUnavailableError("the answer was lost")


async def generated(store: UsageStore, day: date = DAY) -> dict[tuple[str, str], int]:
    """Generated tokens by tenant and task."""
    found = await store.read(day, day)
    return {entry[1:3]: count for entry, count in found if entry.quantity is GENERATED}


async def flushed(ledger: UsageLedger) -> None:
    """As the ledger does by itself every second: again after a failure."""
    for _ in range(2):
        try:
            await ledger.flush()
        except StoreUnavailableError:
            continue


async def test_a_lost_answer_counts_nothing_twice(redis: Redis, tmp_path: Path) -> None:
    store = LosesAnswers(redis)
    ledger = UsageLedger(store, tmp_path, day=lambda: DAY)
    expected: Counter[tuple[str, str]] = Counter()
    for number in range(20):
        for tenant, task in (("acme", "e2e"), ("acme", ""), ("other", "e2e")):
            ledger.add(tenant, task or None, GENERATED, number + 1)
            expected[tenant, task] += number + 1
        await flushed(ledger)
    assert await generated(store) == expected
    assert store.calls > 20


@pytest_asyncio.fixture
async def outage(tmp_path: Path) -> AsyncIterator[tuple[EmbeddedValkey, UsageStore]]:
    """A Valkey to stop, and a store on it as the server has one."""
    valkey = EmbeddedValkey(tmp_path / "valkey")
    await valkey.start()
    connected = connect(valkey.url, 1.0, retries=1)
    yield valkey, UsageStore(connected.client)
    await connected.close()
    await valkey.stop()


async def test_an_outage_loses_nothing(
    outage: tuple[EmbeddedValkey, UsageStore], tmp_path: Path
) -> None:
    valkey, store = outage
    ledger = UsageLedger(store, tmp_path, day=lambda: DAY)
    for _ in range(3):
        ledger.add("acme", "e2e", GENERATED, 5)
        await valkey.stop()
        with pytest.raises(StoreUnavailableError):
            await ledger.flush()
        ledger.add("acme", "e2e", GENERATED, 2)
        await valkey.start()
    await ledger.flush()
    assert await generated(store) == {("acme", "e2e"): 21}


async def test_what_a_stopping_server_cannot_send_the_next_one_sends(
    outage: tuple[EmbeddedValkey, UsageStore], tmp_path: Path
) -> None:
    valkey, store = outage
    first = UsageLedger(store, tmp_path, day=lambda: DAY)
    await first.start()
    await valkey.stop()
    first.add("acme", "e2e", GENERATED, 3)
    with pytest.raises(StoreUnavailableError):
        await first.flush()  # this may have arrived, so that more must not be added to it
    first.add("acme", "e2e", GENERATED, 4)
    await first.close()
    kept = unsent(tmp_path)
    assert len(kept) == 2
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in kept)

    await valkey.start()
    await store.apply(batch_of(kept[0]))  # it had arrived
    second = UsageLedger(store, tmp_path, day=lambda: DAY)
    await second.start()
    second.add("acme", "e2e", GENERATED, 10)
    await second.close()
    assert await generated(store) == {("acme", "e2e"): 17}
    assert not unsent(tmp_path)


def unsent(folder: Path) -> list[Path]:
    return sorted(folder.glob("usage-unsent-*.json"))


def batch_of(path: Path) -> Batch:
    stored = json.loads(path.read_bytes())
    counts = {
        Entry(date.fromisoformat(day), tenant, task, Quantity(quantity)): count
        for day, tenant, task, quantity, count in stored["counts"]
    }
    return Batch(stored["sender"], stored["number"], counts)


async def test_a_report_is_by_day_tenant_and_task(redis: Redis, tmp_path: Path) -> None:
    day = DAY
    ledger = UsageLedger(UsageStore(redis), tmp_path, day=lambda: day)
    for tenant, task, quantity, count in (
        ("acme", "e2e", Quantity.SEQUENCES, 1),
        ("acme", "e2e", Quantity.PROMPT_TOKENS, 44),
        ("acme", "e2e", Quantity.PREFIX_TOKENS, 16),
        ("acme", "e2e", GENERATED, 20),
        ("acme", None, GENERATED, 7),
        ("other", "shared/e2e", GENERATED, 8),
    ):
        ledger.add(tenant, task, quantity, count)
    day = DAY + timedelta(days=1)
    ledger.add("acme", "e2e", GENERATED, 9)
    whole = UsageRow(DAY, "acme", "e2e", 1, 44, 16, 20)
    bare = UsageRow(DAY, "acme", None, generated_tokens=7)
    other = UsageRow(DAY, "other", "shared/e2e", generated_tokens=8)
    later = UsageRow(day, "acme", "e2e", generated_tokens=9)
    assert await ledger.report(DAY, day) == [bare, whole, other, later]
    assert await ledger.report(DAY, DAY) == [bare, whole, other]
    assert await ledger.report(day, day) == [later]
    assert await ledger.report(DAY, day, tenant="other") == [other]
    assert await ledger.report(DAY, day, task_id="e2e") == [whole, later]
    assert await redis.ttl(f"{{prefixserve.usage}}:{DAY}") > 300 * 86_400
