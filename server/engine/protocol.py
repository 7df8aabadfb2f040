"""The contract between the HTTP server and whatever turns requests into tokens."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Protocol

from prefix_store.base_model import BaseModelSpec
from prefix_store.groups import Group
from prefix_store.prefix import Prefix
from prefix_store.soft_prompt import SoftPrompt


class FinishReason(StrEnum):
    """Why a sequence ended, in text-generation-inference's words."""

    LENGTH = "length"
    EOS_TOKEN = "eos_token"  # noqa: S105 - not a password
    STOP_SEQUENCE = "stop_sequence"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request's next token is chosen. The defaults are greedy decoding.

    The order is fixed: repetition, frequency and presence penalties, then, only when `do_sample`,
    temperature, top_k, top_p, min_p, typical_p, and one draw from what is left. With several beams
    nothing is drawn; `processors` says what else is done to the scores.

    Attributes:
        max_new_tokens: most tokens to generate; 0 to have the prompt scored and nothing else.
        do_sample: draw from the distribution instead of taking the most likely token.
        temperature: divides the logits; > 0.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set with at least this probability (Holtzman et al. 2019); (0, 1].
        min_p: keep tokens at least this times as likely as the likeliest; [0, 1].
        typical_p: locally typical sampling mass (Meister et al. 2022); (0, 1].
        repetition_penalty: divides positive and multiplies negative logits of tokens already in
            the prompt or the output (Keskar et al. 2019); > 0, 1 is off.
        frequency_penalty: subtracted from a token's logit for each time it was generated; 0 is off.
        presence_penalty: subtracted from the logits of tokens that were generated; 0 is off.
        seed: a sampled request with the same seed draws the same numbers whatever batch it is in.
        top_logprobs: number of most likely alternatives to report with each token.
        prompt_logprobs: number of most likely alternatives to report with each token of the prompt,
            in a `PromptEvent`; None for no such event. Not with an encoder, which reads the prompt.
        ignore_eos: go on past the tokens that end a text.
        min_new_tokens: no token that ends a text is chosen before so many.
        no_repeat_ngram_size: no sequence of so many tokens comes twice; 0 is off.
        num_beams: hypotheses followed at once, each in a slot; 1 is none of beam search. The best
            one's tokens are told when it is found.
        length_penalty: a hypothesis' log-probability is divided by its length to this power.
        early_stopping: end when there are `num_beams` finished hypotheses (True), when the best
            running one at its present length is no better than these (False), or at any length
            ("never"), as in transformers.
    """

    max_new_tokens: int
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0
    top_logprobs: int = 0
    prompt_logprobs: int | None = None
    ignore_eos: bool = False
    min_new_tokens: int = 0
    no_repeat_ngram_size: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False


@dataclass(frozen=True, slots=True)
class Grammar:
    """What a generated text must be, in words that every engine understands.

    Attributes:
        kind: how to read `text`.
        text: a JSON schema, or a regular expression that the whole text matches, or a JSON list of
            the texts to choose from; empty for any JSON object.
    """

    kind: Literal["json_schema", "json_object", "regex", "choice"]
    text: str = ""


class CompiledGrammar(Protocol):
    """What one engine made of a grammar; only that engine can use it."""

    @property
    def grammar(self) -> Grammar:
        """What it was made of."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to generate.

    Attributes:
        request_id: unique among the engine's live requests.
        prompt_ids: the prompt's token ids, at least one.
        prefix_version: a version given to `Engine.load_prefix`, or None for the bare base model.
        tenant: whose turns it takes; tenants of one priority are served in proportion to their
            weights.
        weight: the tenant's from now on; > 0.
        priority: higher ones go first, always: a lower one runs in what they leave, and gives its
            slots up to them.
        grammar: what `Engine.compile_grammar` gave, or None for any text. It ends when the grammar
            allows nothing more, and the model can end it wherever the grammar allows an end.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    prefix_version: str | None = None
    tenant: str = ""
    weight: float = 1.0
    priority: int = 0
    grammar: CompiledGrammar | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and the base model's log-probability for it, before penalties and sampling."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One generated token.

    Attributes:
        chosen: the token and its log-probability.
        top: the `top_logprobs` most likely tokens, likeliest first.
        finish_reason: set on the last event of a request.
        queue_seconds: on the first event, how long the request waited for slots until then; else
            None.
    """

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    queue_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class PromptToken:
    """A token of a prompt and what the model, with the prefix, thought of it.

    Attributes:
        logprob: given the prefix and the prompt before it, before penalties and sampling; None for
            the first token, before which the model computes nothing.
        top: the `prompt_logprobs` most likely tokens in its place, likeliest first.
    """

    token_id: int
    logprob: float | None
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptEvent:
    """A request's prompt is computed: before its first token, where `prompt_logprobs` asks for it.

    Attributes:
        tokens: the whole prompt.
        finish_reason: set where no token is to be generated.
        queue_seconds: how long the request waited for a slot.
    """

    tokens: tuple[PromptToken, ...]
    finish_reason: FinishReason | None
    queue_seconds: float


StreamEvent = PromptEvent | TokenEvent


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot. `waiting` requests have no slot yet; `max_slots` can run at once."""

    running: int
    waiting: int
    max_slots: int


@dataclass(frozen=True, slots=True)
class StepStats:
    """What one step did.

    Attributes:
        decode_rows: sequences that were given their next token by the one before.
        prefill_tokens: computed of prompts, and again of sequences that had lost their slots.
        preempted: sequences that lost their slots.
        seconds: wall time.
    """

    decode_rows: int
    prefill_tokens: int
    preempted: int
    seconds: float
    stats: EngineStats


StepObserver = Callable[[StepStats], None]
"""Called on the engine's thread after each step; must be quick and must not raise."""


Quantize = Literal["none", "int8"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes of an engine.

    Attributes:
        max_slots: sequences that run at once.
        max_length: positions per slot; lowered to what the model has positions for.
        prefill_tokens: most prompt tokens computed in one step.
        max_waiting: sequences that may wait for a slot, each beam being one; more are refused, but
            for tenants that have fewer than an equal share of the places here.
        quantize: the weights' numbers; int8 is faster and a little less faithful, on a CPU.
        cuda_graphs: on CUDA, capture decode steps at start; takes some seconds and memory.
    """

    max_slots: int = 64
    max_length: int = 2048
    prefill_tokens: int = 256
    max_waiting: int = 512
    quantize: Quantize = "none"
    cuda_graphs: bool = True


class EngineError(Exception):
    """Base of what `Engine` raises; its text is written for the end user."""


class QueueFullError(EngineError):
    """Too many requests wait already; try again later."""


class RequestTooLongError(EngineError):
    """prefix + prompt + max_new_tokens is over `max_length`."""


class PrefixNotLoadedError(EngineError):
    """The request names a version that `load_prefix` was not given."""


class InvalidGrammarError(EngineError):
    """The grammar cannot be read, has no finite text, or is too large; or this model has none."""


class UnsupportedRequestError(EngineError):
    """This engine cannot generate in the way that the request asks for."""


class EngineFailedError(EngineError):
    """The step this request was in failed, or the engine is closed."""


class GrammarFailedError(EngineFailedError):
    """The request's grammar turned out to be too complex, or led where no token can go on."""


class TokenStream(Protocol):
    """The tokens of one request, as they are generated; its prompt's first if it asks for them."""

    def __aiter__(self) -> AsyncIterator[StreamEvent]:
        """Itself."""

    async def __anext__(self) -> StreamEvent:
        """The next event; EngineFailedError when there will be none."""

    async def aclose(self) -> None:
        """Cancel the request if it has not ended."""


class Engine(Protocol):
    """Turns requests into tokens. All methods are called on the event loop."""

    @property
    def spec(self) -> BaseModelSpec:
        """The base model it runs."""

    @property
    def max_length(self) -> int:
        """Most positions one sequence may take: prefix + prompt + generated; with an encoder,
        prefix + prompt there and prefix + generated in the decoder."""

    @property
    def reads_host_memory(self) -> bool:
        """Whether loaded prefixes are in host memory, so that a cache before it saves nothing."""

    @property
    def is_alive(self) -> bool:
        """False once it cannot generate any more; only a restart helps then."""

    def check_places(self, tenant: str, sequences: int) -> None:
        """Refuse a call of so many sequences, each beam being one, before anything is done for it.

        Nothing is kept for it: `submit` may still find the queue full.

        Raises:
            QueueFullError
        """

    def submit(self, request: GenerationRequest) -> TokenStream:
        """Queue a request; its tokens come from the iterator, the last with a finish_reason.

        Raises at once: QueueFullError, RequestTooLongError, PrefixNotLoadedError,
        UnsupportedRequestError, EngineFailedError. While iterating: EngineFailedError. Who stops
        iterating early calls the stream's `aclose`.
        """

    def cancel(self, request_id: str) -> None:
        """Stop a request and free its slot within one step; unknown ids are ignored."""

    def room(self, prompt_tokens: int, prefix_length: int) -> int:
        """Most tokens that can be generated from such a prompt; 0 or less where none can.

        Raises:
            RequestTooLongError: an encoder cannot read a prompt of this length.
        """

    def prefix_bytes(self, prefix_length: int, groups: Collection[Group]) -> int:
        """Memory that a prefix of so many positions in each group takes once loaded."""

    def prepare_prefix(self, prefix: Prefix) -> Prefix:
        """The prefix in host memory as `load_prefix` copies it fastest; on any thread."""

    async def load_prefix(self, version: str, prefix: Prefix) -> None:
        """Put a prefix, already checked against `spec`, where the model can read it."""

    def drop_prefix(self, version: str) -> None:
        """Forget a prefix; running requests that started with it are not disturbed."""

    async def compute_prefix(self, prompt: tuple[int, ...] | SoftPrompt) -> Prefix:
        """Run token ids (`method="text"`) or a soft prompt, already checked against `spec`,
        through the model once and return its keys and values.

        Raises:
            RequestTooLongError: no room for text is left beside it.
            IncompatiblePrefixError: the model has an encoder, which leaves nothing behind.
            InvalidPrefixError: the keys or values are not finite.
            EngineFailedError
        """

    async def compile_grammar(self, grammar: Grammar) -> CompiledGrammar:
        """Make a grammar ready for requests, without disturbing those that run.

        Raises:
            InvalidGrammarError
        """

    def stats(self) -> EngineStats:
        """A snapshot of the queue and the slots."""

    async def close(self, drain_seconds: float = 0.0) -> None:
        """Refuse new requests, finish running ones for at most `drain_seconds`, free everything."""
