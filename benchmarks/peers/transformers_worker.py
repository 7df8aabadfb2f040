"""transformers as a peer: one static batch without a prefix, or PEFT prefixes one task at a time.

    python -m benchmarks.peers.transformers_worker MODEL [--prefix-tasks COUNT]

With tasks, request i selects the i-th adapter and generates alone, as PEFT is used for many tasks
today: its adapters cannot share a batch when they are prefixes.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.peers.worker import Generate, serve

PREFIX_LENGTH = 16


def load_static(model_path: str) -> tuple[str, Generate]:
    """One `generate` over a left-padded batch."""
    import torch
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path, padding_side="left")

    def generate(prompts: list[list[int]], new_tokens: int) -> int:
        batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
        output = model.generate(**batch, **_greedy(new_tokens))
        return len(prompts) * int(output.shape[1] - batch["input_ids"].shape[1])

    return transformers.__version__, generate


def load_peft(model_path: str, tasks: int) -> tuple[str, Generate]:
    """`set_adapter` and `generate` for each request in turn."""
    import peft
    import torch
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX_LENGTH)
    model: Any = peft.get_peft_model(base, config, adapter_name="task-0")
    for i in range(1, tasks):
        model.add_adapter(f"task-{i}", config)
    model.to(torch.bfloat16).eval()

    def generate(prompts: list[list[int]], new_tokens: int) -> int:
        tokens = 0
        for i, ids in enumerate(prompts):
            model.set_adapter(f"task-{i}")
            prompt = torch.tensor([ids])
            output = model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), **_greedy(new_tokens)
            )
            tokens += int(output.shape[1] - prompt.shape[1])
        return tokens

    return f"peft {peft.__version__}, transformers {transformers.__version__}", generate


def _greedy(new_tokens: int) -> dict[str, Any]:
    """Exactly that many tokens, whether or not the text ends before."""
    return {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--prefix-tasks", type=int, default=0)
    options = parser.parse_args()
    if options.prefix_tasks:
        serve(lambda: load_peft(options.model, options.prefix_tasks))
    else:
        serve(lambda: load_static(options.model))
