"""The one vLLM engine that tests share, and which of the kernels' loops they run on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack

import pytest

from server.engine.kernels import library
from tests.engine.vllm_subject import VllmSubject


@pytest.fixture(scope="session")
async def vllm_subject(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VllmSubject]:
    """vLLM's engine on a tiny model, started when it is asked for."""
    async with AsyncExitStack() as stack:
        yield VllmSubject(tmp_path_factory.mktemp("tiny-vllm"), stack)


@pytest.fixture(params=["this processor", "any processor"])
def loops(request: pytest.FixtureRequest) -> Iterator[None]:
    """Which inner loops compute."""
    compiled = library()
    assert compiled is not None
    compiled.choose_tiles(int(request.param == "any processor"))
    yield
    compiled.choose_tiles(0)
