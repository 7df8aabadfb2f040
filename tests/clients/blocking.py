"""`AsyncClient` called as `Client` is, so that one test holds both to the same behaviour."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from clients import AsyncClient, Client, StreamToken

ClientFactory = Callable[..., Any]


class _Blocking:
    def __init__(self, runner: asyncio.Runner, client: AsyncClient) -> None:
        self._runner = runner
        self._client = client

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(self._run, getattr(self._client, name))

    def _run(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        async def call() -> Any:
            return await method(*args, **kwargs)

        return self._runner.run(call())

    def stream(self, *args: Any, **kwargs: Any) -> Generator[StreamToken]:
        tokens = self._client.stream(*args, **kwargs)
        try:
            while True:
                try:
                    yield self._run(tokens.__anext__)
                except StopAsyncIteration:
                    return
        finally:
            self._run(tokens.aclose)


@contextmanager
def blocking_client(kind: str, *args: Any, **kwargs: Any) -> Iterator[Client]:
    """A `Client`, or an `AsyncClient` behind the same methods."""
    if kind == "sync":
        with Client(*args, **kwargs) as client:
            yield client
        return
    with asyncio.Runner() as runner:
        async_client = AsyncClient(*args, **kwargs)
        try:
            yield cast(Client, _Blocking(runner, async_client))
        finally:
            runner.run(async_client.aclose())
