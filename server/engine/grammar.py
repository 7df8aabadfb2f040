"""Grammars: llguidance compiles them, and tells at each step which tokens may come next."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer

from prefix_store.model_loading import LoadedModel
from server.engine.json_schema import check_schema
from server.engine.protocol import Grammar, GrammarFailedError, InvalidGrammarError

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_CHARS = 65_536
_KEPT = 64
_COMPILED_AT_ONCE = 2
_SHOWN_CHARS = 300
# JSON on one line: a small model that may write white space anywhere writes nothing else.
_JSON_FORM: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": r",\x20?",
    "key_separator": r":\x20?",
}
# Fractions of the library's own, which are for whole sets of schemas: a matcher takes tens of
# megabytes at most, and gives up after a fraction of a second.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000,
    step_lexer_fuel=50_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)


class Matcher:
    """Which tokens may come next in one text, found out while the model computes.

    Belongs to the engine's thread. What comes next after a token takes microseconds for most
    grammars, and for some a good part of a second, in which others are not to wait.
    """

    def __init__(self, start: LLMatcher, pool: ThreadPoolExecutor) -> None:
        """
        Args:
            start: at the start of the text, and nobody else's.
            pool: where to look ahead.
        """
        self._matcher = start  # the pool's alone until what it was asked is answered
        self._pool = pool
        self._bits: Future[bytes] = pool.submit(_allowed, start)
        self._is_complete = False

    @property
    def is_complete(self) -> bool:
        """True once the text is whole and nothing more may come."""
        return self._is_complete

    @property
    def is_ready(self) -> bool:
        """True when it is known what may come next; until then only `wait_for` it."""
        return self._bits.done()

    @property
    def failure(self) -> GrammarFailedError | None:
        """Why nothing may come next, the text not being whole; once ready."""
        error = self._bits.exception()
        if error is None or isinstance(error, GrammarFailedError):
            return error
        raise error

    def allows(self, token_id: int) -> bool:
        """May this token come next? Once ready, without failure."""
        return bool(self._bits.result()[token_id >> 3] >> (token_id & 7) & 1)

    def mask(self, scores: torch.Tensor) -> None:
        """Set the scores, `[vocab]`, of tokens that may not come next to -inf; as `allows`."""
        bits = np.unpackbits(np.frombuffer(self._bits.result(), np.uint8), bitorder="little")
        forbidden = torch.from_numpy(bits[: len(scores)] == 0)
        scores.masked_fill_(forbidden.to(scores.device), -torch.inf)

    def advance(self, token_id: int) -> None:
        """A token came, one that is allowed; once ready."""
        self._matcher.consume_token(token_id)
        self._is_complete = self._matcher.is_stopped()
        if not self._is_complete:
            self._bits = self._pool.submit(_allowed, self._matcher)

    @staticmethod
    def wait_for(matchers: Iterable[Matcher], seconds: float) -> None:
        """Return when all are ready, or after so long."""
        wait([matcher._bits for matcher in matchers], seconds)


def _allowed(matcher: LLMatcher) -> bytes:
    """A bit for each token, of the model's and no more."""
    bits = matcher.compute_bitmask()
    if matcher.is_error():
        raise GrammarFailedError(f"the grammar cannot be followed here: {_error_of(matcher)}")
    return bits


@dataclass(frozen=True, slots=True)
class TokenGrammar:
    """A grammar, compiled for one model's tokens."""

    grammar: Grammar
    _start: LLMatcher
    _pool: ThreadPoolExecutor

    def matcher(self) -> Matcher:
        """For one text."""
        return Matcher(self._start.deep_copy(), self._pool)


class GrammarCompiler:
    """Compiles grammars for one model, and keeps those that were used last."""

    def __init__(self, loaded: LoadedModel, eos: frozenset[int]) -> None:
        """
        Args:
            eos: the tokens that end a text; without any the tokenizer's own.
        """
        self._loaded = loaded
        self._eos = eos
        self._turns = asyncio.Semaphore(_COMPILED_AT_ONCE)
        self._kept = lru_cache(maxsize=_KEPT)(self._compile)
        self._pool = ThreadPoolExecutor(_COMPILED_AT_ONCE, "grammar")

    async def compile(self, grammar: Grammar) -> TokenGrammar:
        """In a thread, a few at a time, so that other requests go on.

        Raises:
            InvalidGrammarError
        """
        if len(grammar.text) > MAX_CHARS:
            raise InvalidGrammarError(
                f"the grammar has {len(grammar.text)} characters; expected at most {MAX_CHARS}"
            )
        async with self._turns:
            return await asyncio.to_thread(self._kept, grammar)

    def close(self) -> None:
        """Stop looking ahead."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, grammar: Grammar) -> TokenGrammar:
        try:
            source = llguidance_grammar(grammar)
            start = LLMatcher(self._tokenizer, source, log_level=0, limits=_LIMITS)
        except ValueError as error:
            raise InvalidGrammarError(f"the {_name(grammar)} cannot be read: {error}") from None
        if not start.is_error():
            start.compute_bitmask()  # with nothing that can begin a text it is an error
        if start.is_error():
            raise InvalidGrammarError(f"the {_name(grammar)} cannot be used: {_error_of(start)}")
        return TokenGrammar(grammar, start, self._pool)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        tokenizer: Any = self._loaded.tokenizer
        eos = sorted(self._eos) or None
        size = self._loaded.model.config.vocab_size
        try:
            return from_tokenizer(tokenizer, n_vocab=size, eos_token=eos)
        except Exception as error:
            raise InvalidGrammarError(
                f"{self._loaded.spec.name!r} cannot follow a grammar: its tokenizer is of a kind "
                f"that llguidance does not read ({error})"
            ) from error


def llguidance_grammar(grammar: Grammar) -> str:
    """A grammar in llguidance's own words.

    Raises:
        InvalidGrammarError: a JSON schema that would never end, or is out of bounds.
        ValueError: it is not JSON where it must be.
    """
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "choice":
        texts: list[str] = json.loads(grammar.text)
        if not texts:
            raise InvalidGrammarError("the choice is empty; expected one text or more")
        return LLMatcher.grammar_from_regex("|".join(map(re.escape, texts)))
    text = grammar.text or '{"type": "object"}'
    check_schema(text)
    return LLMatcher.grammar_from_json_schema(text, _JSON_FORM)


def _name(grammar: Grammar) -> str:
    names = {"regex": "regular expression", "choice": "choice"}
    return names.get(grammar.kind, "JSON schema")


def _error_of(matcher: LLMatcher) -> str:
    error = matcher.get_error().replace("<non-verbose/>", "")
    error = error.replace("NoExtensionBias", "there is no text that it allows")
    return " ".join(error.split())[:_SHOWN_CHARS]
