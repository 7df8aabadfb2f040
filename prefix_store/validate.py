"""Whether a prefix fits a base model."""

from __future__ import annotations

from prefix_store.base_model import BaseModelSpec, same_model_name
from prefix_store.errors import IncompatiblePrefixError
from prefix_store.groups import group_tensors
from prefix_store.prefix import Prefix
from prefix_store.soft_prompt import PROMPT_EMBEDDINGS, SoftPrompt


def check_fits(prefix: Prefix | SoftPrompt, spec: BaseModelSpec, max_prefix_length: int) -> None:
    """Refuse a prefix or soft prompt that the base model `spec` cannot use.

    Args:
        max_prefix_length: most positions a prefix may take on this server; the model's own
            `max_positions` bounds it too.

    Raises:
        IncompatiblePrefixError: other layers, key-value heads, head size or embedding size, too
            long, of a model with an encoder where this one has none or the other way round, or made
            for another base model.
    """
    longest = min(max_prefix_length, spec.max_positions - 1)
    if isinstance(prefix, SoftPrompt):
        _check_embedding_size(prefix, spec)
        _check_length(PROMPT_EMBEDDINGS, prefix.embeddings.shape, prefix.prefix_length, longest)
        check_same_model(prefix.base_model, "", spec)
    else:
        _check_kind(prefix, spec)
        _check_sizes(prefix, spec)
        group, keys_values = next(iter(prefix.groups.items()))
        name = group_tensors(group)[0]
        _check_length(name, keys_values.keys.shape, prefix.prefix_length, longest)
        check_same_model(prefix.base_model, prefix.fingerprint, spec)


def check_same_model(base_model: str, fingerprint: str, spec: BaseModelSpec) -> None:
    """Refuse a prefix made for another base model; an empty argument is unknown, not different.

    Raises:
        IncompatiblePrefixError: the fingerprints differ, or one is unknown and the names differ.
    """
    if fingerprint and spec.fingerprint:
        if fingerprint != spec.fingerprint:
            raise IncompatiblePrefixError(
                f"the prefix was made for base model {base_model!r} with fingerprint "
                f"{fingerprint[:12]}; this server runs {spec.name!r}, {spec.fingerprint[:12]}. "
                "Train it on the model that the server runs."
            )
    elif base_model and not same_model_name(base_model, spec.name):
        raise IncompatiblePrefixError(
            f"the prefix names the base model {base_model!r}; this server runs {spec.name!r}. "
            "If they are the same model, rename it in the prefix."
        )


def _check_kind(prefix: Prefix, spec: BaseModelSpec) -> None:
    if prefix.encoder_decoder != (spec.encoder is not None):
        made, runs = "a decoder-only", "an encoder-decoder"
        if prefix.encoder_decoder:
            made, runs = runs, made
        raise IncompatiblePrefixError(
            f"the prefix, of {', '.join(sorted(prefix.groups))}, was made for {made} model; this "
            f"server runs {runs} one, {spec.name!r}. Train it on the model that the server runs."
        )


def _check_sizes(prefix: Prefix, spec: BaseModelSpec) -> None:
    for group, keys_values in prefix.groups.items():
        shape = keys_values.keys.shape
        expected = spec.shape(group, prefix.prefix_length)
        for what, found, wanted in zip(_DIMENSIONS, shape, expected, strict=True):
            if found != wanted:
                raise IncompatiblePrefixError(
                    f"{group_tensors(group)[0]} has {found} {what} and the base model "
                    f"{spec.name!r} has {wanted}: found shape {list(shape)}, expected "
                    f"{list(expected)}"
                    + (f"; the prefix names {prefix.base_model!r}" if prefix.base_model else "")
                )


_DIMENSIONS = ("layers", "key-value heads", "positions", "numbers per head")


def _check_embedding_size(prompt: SoftPrompt, spec: BaseModelSpec) -> None:
    length, size = prompt.embeddings.shape
    if size != spec.embedding_size:
        raise IncompatiblePrefixError(
            f"{PROMPT_EMBEDDINGS} has shape {[length, size]}; expected "
            f"[{length}, {spec.embedding_size}], the embedding size of the base model {spec.name!r}"
        )


def _check_length(name: str, shape: tuple[int, ...], length: int, longest: int) -> None:
    if length > longest:
        raise IncompatiblePrefixError(
            f"{name} has prefix length {length} (shape {list(shape)}); expected at most {longest}, "
            "to leave room for text on this server"
        )
