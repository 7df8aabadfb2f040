"""A request's settings in vLLM's words."""

from __future__ import annotations

from typing import Any

import vllm
from vllm.sampling_params import RequestOutputKind

from server.engine.protocol import SamplingParams, UnsupportedRequestError

_REFUSED = ("num_beams", "typical_p", "no_repeat_ngram_size", "prompt_logprobs")


def to_vllm(params: SamplingParams, kv_transfer_params: dict[str, Any]) -> vllm.SamplingParams:
    """The same settings for vLLM.

    It filters by min_p before top_k and top_p, and draws other numbers from a seed.

    Args:
        kv_transfer_params: what the connector is told of the request.

    Raises:
        UnsupportedRequestError: vLLM does not have one of them.
    """
    defaults = SamplingParams(max_new_tokens=1)
    for name in _REFUSED:
        if (found := getattr(params, name)) != getattr(defaults, name):
            raise UnsupportedRequestError(
                f"{name} is {found}, and this server generates with vLLM, which does not have it "
                "beside a prefix; leave it out"
            )
    return vllm.SamplingParams(
        max_tokens=params.max_new_tokens,
        min_tokens=params.min_new_tokens,
        temperature=params.temperature if params.do_sample else 0.0,
        top_k=params.top_k if params.do_sample else 0,
        top_p=params.top_p if params.do_sample else 1.0,
        min_p=params.min_p if params.do_sample else 0.0,
        repetition_penalty=params.repetition_penalty,
        frequency_penalty=params.frequency_penalty,
        seed=params.seed if params.do_sample else None,
        logprobs=params.top_logprobs,
        ignore_eos=params.ignore_eos,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args={"kv_transfer_params": kv_transfer_params} if kv_transfer_params else None,
    )
