"""Everything of accounting that a running server holds open."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from prefix_store.redis_store.connecting import Connected, connect
from server.accounting.account import Accounting
from server.accounting.book import LimitsBook
from server.accounting.counting import Counting
from server.accounting.limiter import Limiter
from server.accounting.limits import TenantLimits
from server.accounting.reaching import Breaker
from server.accounting.redis_counters import RedisCounters
from server.accounting.usage import UsageLedger
from server.accounting.usage_store import UsageStore
from server.metrics import Metrics
from server.settings import Settings

_ANSWER_SECONDS = 1.0  # a request waits for this


@asynccontextmanager
async def running_accounting(
    settings: Settings, store: Connected, metrics: Metrics
) -> AsyncIterator[Accounting]:
    """Limits and usage in the server that the store is in, by connections of their own.

    Little is retried: requests wait. A charge whose answer was lost may count twice.
    """
    async with AsyncExitStack() as stack:
        connected = connect(
            store.url, min(_ANSWER_SECONDS, settings.store_timeout_seconds), retries=1
        )
        stack.push_async_callback(connected.close)
        breaker = Breaker()
        counting = Counting(RedisCounters(connected.client), breaker)
        stack.push_async_callback(counting.close)
        await counting.start()
        ledger = UsageLedger(UsageStore(connected.client), settings.data_dir.expanduser())
        stack.push_async_callback(ledger.close)
        await ledger.start()
        book = LimitsBook(connected.client, default_limits(settings), breaker)
        yield Accounting(Limiter(book, counting), ledger, metrics)


def default_limits(settings: Settings) -> TenantLimits:
    """Limits of a tenant for which no others are set."""
    given = settings.model_dump()
    names = TenantLimits.model_fields.keys() - {"weight"}
    limits = {name: given[f"limit_{name}"] for name in names}
    return TenantLimits.model_validate(
        {name: int(limit) for name, limit in limits.items() if limit is not None}
    )
