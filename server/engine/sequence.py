"""One request on its way through the engine."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

from prefix_store.groups import DECODER, Group
from prefix_store.prefix import Prefix
from server.engine.account import INPUT_COST, OUTPUT_COST, Account
from server.engine.grammar import Matcher, TokenGrammar
from server.engine.protocol import GenerationRequest, PromptToken

NO_SLOT = -1


@dataclass(slots=True, eq=False)
class Sequence:
    """The engine thread's own state of a request; nothing outside that thread touches it.

    Attributes:
        request: what was asked.
        prefix: already on the model's device, or None for the bare base model.
        prompt_ids: what the decoder begins with: the request's prompt, or of an encoder-decoder
            model the one token that every text starts from, its prompt being the encoder's.
        slot: its row of the KV memory, or NO_SLOT while it waits.
        length: positions of the slot that are filled: the prefix, then the tokens computed so far.
        output_ids: tokens generated so far; the last one is not in the slot yet.
        prompt_scores: where they are wanted, those of the prompt so far, but for the first token.
        arrived_at, queued_at: when it came, and when it last began to wait for a slot.
        queue_seconds: how long it has waited for slots in all.
        matcher: what its grammar allows next, or None where any text may come.
        is_sibling: a beam beside another, which computes the prompt for it.
        siblings: with beam search, the other beams: they get slots with it, but no prompt.
        prefill_ids: what it computes before it decodes: the prompt, and where it has lost a slot,
            what it had generated until then.
        is_decoding: all that is computed; from here on it is one token a step.
        was_preempted: it had a slot before the one it has or waits for.
        account: whom its tokens are charged to, once it is queued.
    """

    request: GenerationRequest
    prefix: Prefix | None
    prompt_ids: tuple[int, ...] = ()
    slot: int = NO_SLOT
    length: int = 0
    output_ids: list[int] = field(default_factory=list)
    prompt_scores: list[PromptToken] = field(default_factory=list)
    arrived_at: float = field(default_factory=time.perf_counter)
    queued_at: float = field(init=False)
    queue_seconds: float = 0.0
    is_sibling: bool = False
    matcher: Matcher | None = field(init=False, default=None)
    siblings: tuple[Sequence, ...] = field(init=False, default=())
    prefill_ids: tuple[int, ...] = field(init=False)
    is_decoding: bool = field(init=False, default=False)
    was_preempted: bool = field(init=False, default=False)
    account: Account = field(init=False)
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_ids = self.prompt_ids or self.request.prompt_ids
        self.prefill_ids = self.prompt_ids
        self.queued_at = self.arrived_at
        self.rng = random.Random(self.request.sampling.seed)  # noqa: S311 - not for secrets
        if isinstance(self.request.grammar, TokenGrammar):
            self.matcher = self.request.grammar.matcher()
        if not self.is_sibling:
            self.siblings = tuple(
                Sequence(self.request, self.prefix, self.prompt_ids, is_sibling=True)
                for _ in range(1, self.request.sampling.num_beams)
            )

    @property
    def is_beam(self) -> bool:
        """True for the sequences of a beam search."""
        return self.is_sibling or bool(self.siblings)

    @property
    def is_scored(self) -> bool:
        """True where its prompt's log-probabilities are wanted and not known yet."""
        return self.request.sampling.prompt_logprobs is not None and not self.output_ids

    @property
    def beams(self) -> tuple[Sequence, ...]:
        """Itself and its siblings, one for each beam."""
        return (self, *self.siblings)

    @property
    def served(self) -> int:
        """What its tokens until now cost its account."""
        prompt = 0 if self.is_sibling else INPUT_COST * len(self.request.prompt_ids)
        return prompt + OUTPUT_COST * len(self.output_ids)

    @property
    def prefix_length(self) -> int:
        """Positions of its slot taken by the prefix."""
        return self.prefix_length_in(DECODER)

    def prefix_length_in(self, group: Group) -> int:
        """Positions taken by the prefix in one group."""
        return 0 if self.prefix is None else self.prefix.length_in(group)

    @property
    def source_ids(self) -> tuple[int, ...]:
        """What the encoder reads; nothing where there is none."""
        return () if self.prompt_ids is self.request.prompt_ids else self.request.prompt_ids

    @property
    def uncomputed(self) -> tuple[int, ...]:
        """What of `prefill_ids` is not in the slot yet."""
        return self.prefill_ids[max(0, self.length - self.prefix_length) :]

    @property
    def prefill_end(self) -> int:
        """One past the position of the last of `prefill_ids`."""
        return self.prefix_length + len(self.prefill_ids)

    @property
    def prompt_end(self) -> int:
        """One past the position of the prompt's last token."""
        return self.prefix_length + len(self.prompt_ids)

    def preempt(self, now: float) -> None:
        """Begin to wait again: what it has computed is lost, what it has generated is kept."""
        self.prefill_ids = (*self.prompt_ids, *self.output_ids)
        self.prompt_scores.clear()
        self.is_decoding = False
        self.was_preempted = True
        self.queued_at = now
