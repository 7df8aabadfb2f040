"""Text that must follow a grammar: what goes together with one, and having it compiled."""

from __future__ import annotations

from server.engine.protocol import CompiledGrammar, Engine, Grammar, SamplingParams
from server.errors import InvalidRequestError


async def compiled(
    engine: Engine, grammar: Grammar | None, sampling: SamplingParams
) -> CompiledGrammar | None:
    """The grammar as requests take it; None for none.

    Raises:
        InvalidRequestError: the request also asks for what no grammar can promise.
        InvalidGrammarError
    """
    if grammar is None:
        return None
    for name, asked, why in (
        ("num_beams", sampling.num_beams > 1, "beam search does not follow one"),
        ("ignore_eos", sampling.ignore_eos, "nothing may come after its end"),
        ("min_new_tokens", sampling.min_new_tokens > 0, "it may allow no more tokens before"),
        ("no_repeat_ngram_size", sampling.no_repeat_ngram_size > 0, "it may demand a repetition"),
    ):
        if asked:
            raise InvalidRequestError(
                f"{name} is {getattr(sampling, name)} beside a grammar, and {why}; leave out one "
                "of them"
            )
    return await engine.compile_grammar(grammar)
