"""What is vLLM's alone: refusals, lost prefixes, several ranks."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from server.engine.protocol import (
    EngineFailedError,
    Grammar,
    InvalidGrammarError,
    UnsupportedRequestError,
)
from server.engine.vllm.environment import cores_of_ranks
from tests.engine.reference import greedy, random_prefix
from tests.engine.subject import CONFIG, request, tokens
from tests.engine.vllm_subject import VllmSubject, needs_vllm, saved, tiny_vllm_model

pytestmark = [pytest.mark.vllm, needs_vllm]


@pytest.mark.parametrize(
    ("setting", "value"),
    [("num_beams", 2), ("typical_p", 0.9), ("no_repeat_ngram_size", 3), ("prompt_logprobs", 0)],
)
async def test_what_vllm_does_not_have_is_refused(
    vllm_subject: VllmSubject, setting: str, value: float
) -> None:
    engine = (await vllm_subject.get()).engine
    with pytest.raises(UnsupportedRequestError, match=f"{setting} is {value}, .*leave it out"):
        engine.submit(request("a", **{setting: value}))
    with pytest.raises(InvalidGrammarError, match="--engine native"):
        await engine.compile_grammar(Grammar("json_object"))


async def test_a_prefix_that_is_lost_fails_its_own_request_only(vllm_subject: VllmSubject) -> None:
    subject = await vllm_subject.get()
    engine, loaded = subject.engine, subject.loaded
    await engine.load_prefix("lost", random_prefix(loaded, 40, seed=9))
    for file in engine._folder.path.glob("lost*"):
        file.unlink()
    neighbour = engine.submit(request("good", new=20))
    for name in ("first", "again"):
        with pytest.raises(EngineFailedError, match="try again"):
            await tokens(engine.submit(request(name, version="lost")))
    assert await tokens(neighbour) == greedy(loaded, None, (9, 10), 20)[0]
    engine.drop_prefix("lost")


async def test_each_rank_has_its_own_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from server.engine.vllm.arguments import VllmOptions  # noqa: PLC0415 - these import vLLM
    from server.engine.vllm.engine import VllmEngine  # noqa: PLC0415

    cores = cores_of_ranks(sorted(os.sched_getaffinity(0)), 2)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", cores)
    loaded = tiny_vllm_model()
    options = VllmOptions(tensor_parallel_size=2, block_size=32)
    engine = VllmEngine(saved(loaded, tmp_path), replace(CONFIG, max_slots=2), options)
    try:
        prefixes = {f"v{length}": random_prefix(loaded, length, length) for length in (3, 33)}
        for version, prefix in prefixes.items():
            await engine.load_prefix(version, prefix)
        found = await asyncio.gather(
            *(tokens(engine.submit(request(v, (9, 10, 11), 12, v))) for v in prefixes)
        )
        text = tuple(range(6, 46))
        computed = await engine.compute_prefix(text)
    finally:
        await engine.close()
    expected = [greedy(loaded, prefix, (9, 10, 11), 12)[0] for prefix in prefixes.values()]
    assert found == expected
    past = loaded.model(torch.tensor([text]), use_cache=True).past_key_values
    for layer in range(loaded.spec.num_layers):
        assert torch.allclose(computed.keys[layer], past.layers[layer].keys[0], atol=1e-4)
