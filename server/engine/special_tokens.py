"""Tokens that a model's own configuration gives a meaning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prefix_store.errors import ModelLoadError
from prefix_store.model_loading import LoadedModel


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Which tokens begin and end a text.

    Attributes:
        eos: each ends a text.
        decoder_start: what every text of an encoder-decoder model starts from; else None.
        forced_bos: the first token after that, if it is always the same (BART's).
        forced_eos: the token at the last position that a request allows, if it is always the same.
    """

    eos: frozenset[int] = frozenset()
    decoder_start: int | None = None
    forced_bos: int | None = None
    forced_eos: int | None = None

    @classmethod
    def of(cls, loaded: LoadedModel) -> SpecialTokens:
        """From the model's generation config; `decoder_start` may be in its config alone.

        Raises:
            ModelLoadError: an encoder-decoder model does not say what a text starts from.
        """
        generation: Any = loaded.model.generation_config
        start = None
        if loaded.spec.encoder is not None:
            configs = (generation, loaded.model.config)
            found = (getattr(config, "decoder_start_token_id", None) for config in configs)
            start = next((token_id for token_id in found if token_id is not None), None)
            if start is None:
                raise ModelLoadError(
                    f"the config of {loaded.spec.name!r} has no decoder_start_token_id, the token "
                    "that every text starts from; set it in generation_config.json"
                )
        return cls(
            eos=frozenset(_ids(getattr(generation, "eos_token_id", None))),
            decoder_start=start,
            forced_bos=_first(getattr(generation, "forced_bos_token_id", None)),
            forced_eos=_first(getattr(generation, "forced_eos_token_id", None)),
        )


def _ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _first(value: int | list[int] | None) -> int | None:
    return next(iter(_ids(value)), None)
