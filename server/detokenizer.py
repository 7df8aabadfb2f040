"""Token ids to text, one token at a time, up to a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenizers.decoders import DecodeStream

from server.tokenization import TextTokenizer

_INCOMPLETE = "\ufffd"


@dataclass(frozen=True, slots=True)
class TokenText:
    """What one token adds.

    Attributes:
        text: for a special token its name, which is no part of the generated text; else what
            became readable with this token, empty while a character is incomplete.
        stopped: a stop string ends with this token's text.
    """

    text: str
    special: bool
    stopped: bool


def token_texts(tokenizer: TextTokenizer, token_ids: Iterable[int]) -> list[str]:
    """What each token adds to their text, special tokens their names."""
    stream = DecodeStream(skip_special_tokens=False)
    return [stream.step(tokenizer.backend, token_id) or "" for token_id in token_ids]


class Detokenizer:
    """The generated text of one sequence: the texts of its non-special tokens, concatenated.

    A stop string stays in the text, as the last thing in it. A character whose bytes are not
    complete at the end is left out.
    """

    def __init__(self, tokenizer: TextTokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._parts: list[str] = []
        self._stop = tuple(stop)
        self._overlap = max(map(len, self._stop), default=1) - 1
        self._recent = ""

    @property
    def text(self) -> str:
        """Everything so far."""
        return "".join(self._parts)

    def push(self, token_id: int, *, last: bool = False) -> TokenText:
        """Add a token; `last` when the sequence ends with it, so that nothing is held back."""
        if self._tokenizer.is_special(token_id):
            name = self._tokenizer.token_text(token_id)
            return TokenText(name, special=True, stopped=name in self._stop)
        self._ids.append(token_id)
        added = self._stream.step(self._tokenizer.backend, token_id) or ""
        if last and not added:
            added = self._held_back()
        end = self._end_of_stop(added)
        if end is not None:
            added = added[:end]
        self._parts.append(added)
        return TokenText(added, special=False, stopped=end is not None)

    def _held_back(self) -> str:
        """What the stream keeps until its last character is complete, without that character."""
        whole = self._tokenizer.backend.decode(self._ids, skip_special_tokens=True)
        return whole.removeprefix(self.text).rstrip(_INCOMPLETE)

    def _end_of_stop(self, added: str) -> int | None:
        """Where in `added` the first stop string to be complete ends."""
        if not self._stop:
            return None
        window = self._recent + added
        ends = [at + len(stop) for stop in self._stop if (at := window.find(stop)) >= 0]
        known = len(self._recent)
        self._recent = window[-self._overlap :] if self._overlap else ""
        return min(ends) - known if ends else None
