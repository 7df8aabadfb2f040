"""vLLM's CPU build as a peer: the base model, or with a LoRA adapter of its own for each sequence.

python -m benchmarks.peers.vllm_worker MODEL [--lora-adapters FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.peers.worker import Generate, serve

MAX_SEQUENCES, MAX_LENGTH, LORA_RANK = 64, 256, 8


def load(model: str, adapters: Path | None) -> tuple[str, Generate]:
    """Start vLLM; with a folder of adapters, sequence i uses the i-th of them."""
    import vllm
    from vllm.lora.request import LoRARequest

    folders = sorted(adapters.iterdir()) if adapters else []
    loras = [LoRARequest(path.name, i + 1, str(path)) for i, path in enumerate(folders)]
    llm = vllm.LLM(
        model=model,
        dtype="bfloat16",
        max_model_len=MAX_LENGTH,
        max_num_seqs=MAX_SEQUENCES,
        # Every round sends the same prompts; their prefill must not come from the last round.
        enable_prefix_caching=False,
        enable_lora=bool(loras),
        max_loras=max(1, len(loras)),
        max_lora_rank=LORA_RANK,
    )

    def generate(prompts: list[list[int]], new_tokens: int) -> int:
        sampling = vllm.SamplingParams(
            temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            sampling,
            lora_request=loras[: len(prompts)] if loras else None,
            use_tqdm=False,
        )
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return vllm.__version__, generate


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--lora-adapters", type=Path)
    options = parser.parse_args()
    serve(lambda: load(options.model, options.lora_adapters))
