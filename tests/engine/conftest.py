"""The one vLLM engine that tests share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from tests.engine.vllm_subject import VllmSubject


@pytest.fixture(scope="session")
async def vllm_subject(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VllmSubject]:
    """vLLM's engine on a tiny model, started when it is asked for."""
    async with AsyncExitStack() as stack:
        yield VllmSubject(tmp_path_factory.mktemp("tiny-vllm"), stack)
