"""Many requests on one long prefix: shared, or a copy for each.

    python -m benchmarks.shared_prefix

32 sequences of E2E prompts behind one prefix of 2,048 positions, as a Cartridge has. `shared` is
how a task is served; `copies` are the same keys and values as 32 tensors, one per sequence, as
they would lie in the sequences' own slots. Memory counts the prefix's bytes in use.
"""

from __future__ import annotations

from functools import partial

from benchmarks.common import alternate, arguments, load_model, prompts, random_prefix, report
from benchmarks.engine import MAX_SLOTS, decode_rate
from prefix_store.prefix import Prefix
from server.engine.choose_runner import choose_runner

SEQUENCES, LENGTH, NEW_TOKENS = 32, 2048, 16
MAX_LENGTH = 2048 + 256


def nbytes(prefixes: list[Prefix]) -> int:
    """Bytes of the tensors, each counted once."""
    return sum({prefix.keys.data_ptr(): prefix.nbytes for prefix in prefixes}.values())


def main() -> None:
    """Run and report."""
    options = arguments(__doc__ or "").parse_args()
    size, length, new = (2, 64, 4) if options.smoke else (SEQUENCES, LENGTH, NEW_TOKENS)
    rounds = 1 if options.smoke else options.rounds
    loaded = load_model()
    runner = choose_runner(loaded, MAX_SLOTS, MAX_LENGTH)
    prompt_ids = prompts(loaded, size)
    one = random_prefix(loaded, length, seed=0)
    shared = [one] * size
    copies = [Prefix.of(one.keys.clone(), one.values.clone(), method="copy") for _ in range(size)]
    rates = alternate(
        rounds,
        {
            "shared": partial(decode_rate, runner, prompt_ids, list(shared), new),
            "copies": partial(decode_rate, runner, prompt_ids, list(copies), new),
            "no_prefix": partial(decode_rate, runner, prompt_ids, [None] * size, new),
        },
    )
    memory = {"shared": nbytes(shared), "copies": nbytes(copies)}
    results = {"tokens_per_second": rates, "prefix_bytes": memory}
    medians = {name: rate["median"] for name, rate in rates.items()}
    if not options.json:
        print(", ".join(f"{name} {rate:.0f} tokens/s" for name, rate in medians.items()))
    ratios = {
        "shared_prefix_memory": memory["shared"] / memory["copies"],
        "shared_prefix_speed": medians["shared"] / medians["copies"],
    }
    report("shared_prefix", results, ratios)


if __name__ == "__main__":
    main()
