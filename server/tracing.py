"""Whether requests are traced; without, OpenTelemetry is not even imported."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from server.errors import StartupError

if TYPE_CHECKING:
    from server.api.tracing import OpenTelemetry

_ADDRESSES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


@asynccontextmanager
async def opened_tracing(endpoint: str | None) -> AsyncIterator[OpenTelemetry | None]:
    """What sends traces to a collector's address, or to the one that `OTEL_*` name; None without.

    Raises:
        StartupError: OpenTelemetry is not installed.
    """
    if endpoint is None and not any(os.environ.get(name) for name in _ADDRESSES):
        yield None
        return
    try:
        from server.api.tracing import OpenTelemetry  # noqa: PLC0415 - an option
    except ModuleNotFoundError as error:
        raise StartupError(
            f"traces were asked for, and {error.name} is not installed: pip install "
            "'prefixserve[otel]', or unset --otlp-endpoint and OTEL_EXPORTER_OTLP_*"
        ) from error
    tracing = OpenTelemetry(endpoint)
    try:
        yield tracing
    finally:
        await asyncio.to_thread(tracing.close)
