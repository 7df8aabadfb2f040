"""What requests with a grammar cost the requests beside them that have none.

    python -m benchmarks.structured

32 sequences of E2E prompts, and one or eight more beside them: these write JSON by the schema of a
list of E2E restaurants, or, to compare with, anything. Counted are the 32's tokens per second, from
the first token of all to the last; every sequence generates 64.
"""

from __future__ import annotations

import asyncio
import json
from functools import partial

from benchmarks.common import NEW_TOKENS, alternate, arguments, load_model, prompts, report
from benchmarks.engine import MAX_LENGTH, MAX_SLOTS, decode_rate
from prefix_store.model_loading import LoadedModel
from server.engine.choose_runner import choose_runner
from server.engine.grammar import GrammarCompiler
from server.engine.protocol import CompiledGrammar, Grammar
from server.engine.runner import Runner

PLAIN, BESIDE = 32, (1, 8)
RESTAURANT = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "food": {"type": "string", "maxLength": 40},
        "area": {"enum": ["riverside", "city centre"]},
        "price": {"type": "integer", "minimum": 1, "maximum": 100},
        "family_friendly": {"type": "boolean"},
    },
    "required": ["name", "food", "area", "price", "family_friendly"],
    "additionalProperties": False,
}
# So many that none has an end within the tokens generated.
SCHEMA = {"type": "array", "items": RESTAURANT, "minItems": 20}


def compiled(loaded: LoadedModel) -> CompiledGrammar:
    """The schema for the model's tokens."""
    grammar = Grammar("json_schema", json.dumps(SCHEMA))
    return asyncio.run(GrammarCompiler(loaded, eos=frozenset()).compile(grammar))


def plain_rate(
    runner: Runner,
    prompt_ids: list[tuple[int, ...]],
    grammar: CompiledGrammar | None,
    plain: int,
    new: int,
) -> float:
    """Tokens per second of the first `plain` sequences; the others have the grammar."""
    grammars = [None] * plain + [grammar] * (len(prompt_ids) - plain)
    rate = decode_rate(runner, prompt_ids, [None] * len(prompt_ids), new, grammars)
    return rate * plain / len(prompt_ids)


def main() -> None:
    """Run and report."""
    options = arguments(__doc__ or "").parse_args()
    plain, besides, new = (2, (1,), 4) if options.smoke else (PLAIN, BESIDE, NEW_TOKENS)
    loaded = load_model()
    runner = choose_runner(loaded, MAX_SLOTS, MAX_LENGTH)
    grammar = compiled(loaded)
    rate = partial(plain_rate, runner, plain=plain, new=new)
    measures = {"alone": partial(rate, prompts(loaded, plain), None)}
    for beside in besides:
        prompt_ids = prompts(loaded, plain + beside)
        measures[f"beside_{beside}_plain"] = partial(rate, prompt_ids, None)
        measures[f"beside_{beside}_structured"] = partial(rate, prompt_ids, grammar)
    rates = alternate(1 if options.smoke else options.rounds, measures)
    medians = {name: found["median"] for name, found in rates.items()}
    if not options.json:
        print(", ".join(f"{name} {found:.0f} tokens/s" for name, found in medians.items()))
    ratios = {
        f"plain_beside_structured_{beside}": medians[f"beside_{beside}_structured"]
        / medians[f"beside_{beside}_plain"]
        for beside in besides
    }
    report("structured", {"plain_tokens_per_second": rates}, ratios)


if __name__ == "__main__":
    main()
