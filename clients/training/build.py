"""From settings to the model that the Trainer gets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clients._errors import TrainingError
from clients.data import Row
from clients.training.baselines import build_baseline
from clients.training.encoder_decoder import EncoderDecoderPrefixModel
from clients.training.prefixes import (
    DirectPrefix,
    ReparametrisedPrefix,
    TrainedPrefix,
    random_keys_values,
    spread,
    text_keys_values,
)
from clients.training.settings import PREFIX_METHODS, RANDOM, TASK, TEXT, TrainSettings
from clients.training.task_model import PrefixModel, TaskModel
from prefix_store.base_model import BaseModelSpec
from prefix_store.groups import DECODER, Group
from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import SOURCE, Prefix
from prefix_store.validate import check_fits

_CHARS_PER_TOKEN = 20  # more than any tokenizer's average
_SPREAD_TOKENS = 16


def build(
    settings: TrainSettings, loaded: LoadedModel, rows: Sequence[Row], start: Prefix | None
) -> TaskModel:
    """The base model with what `settings.method` trains, which starts as `settings.init` says.

    Args:
        rows: training rows; their text is the default start.
        start: the prefix to start from, with `init` `task:NAME`.

    Raises:
        TrainingError: the start cannot be used, or the model has no such groups or method.
        IncompatiblePrefixError: `start` is of another base model.
    """
    torch.manual_seed(settings.seed)
    groups = _groups(settings, loaded.spec)
    ids = initial_ids(settings, loaded, rows)
    if settings.method not in PREFIX_METHODS:
        return build_baseline(settings, loaded, ids)
    prefixes = _prefixes(settings, loaded, rows, ids, start, groups)
    for prefix in prefixes.values():
        prefix.to(loaded.model.device)
    if loaded.spec.encoder is not None:
        return EncoderDecoderPrefixModel(loaded.model, prefixes)
    return PrefixModel(loaded.model, prefixes[DECODER])


def _groups(settings: TrainSettings, spec: BaseModelSpec) -> tuple[Group, ...]:
    if settings.where is None:
        return spec.groups
    if not settings.where or not set(settings.where) <= set(spec.groups):
        raise TrainingError(
            f"where is {','.join(settings.where)!r}; {spec.name!r} can have a prefix in "
            f"{', '.join(spec.groups)}"
        )
    return tuple(group for group in spec.groups if group in settings.where)


def _prefixes(  # noqa: PLR0917 - all that a start depends on
    settings: TrainSettings,
    loaded: LoadedModel,
    rows: Sequence[Row],
    ids: Sequence[int],
    start: Prefix | None,
    groups: Sequence[Group],
) -> dict[Group, TrainedPrefix]:
    length = settings.prefix_length
    shapes = {group: loaded.spec.shape(group, length) for group in groups}
    initial = _initial(settings, loaded, ids, start, groups)
    if settings.method == "direct":
        text = _encode(loaded, _rows_as_text(settings, rows), _SPREAD_TOKENS)
        seen = text_keys_values(loaded.model, text)
        return {
            group: DirectPrefix(
                initial[group] if group in initial else random_keys_values(shape),
                spread(seen[group]),
                freeze_first=settings.freeze_first,
            )
            for group, shape in shapes.items()
        }
    if ids:
        embed = loaded.model.get_input_embeddings()
        embeddings = embed(torch.tensor(ids, device=loaded.model.device)).detach()
    else:
        embeddings = torch.randn(length, loaded.spec.embedding_size)
    return {
        group: ReparametrisedPrefix(initial.get(group), embeddings, shape)
        for group, shape in shapes.items()
    }


def _initial(
    settings: TrainSettings,
    loaded: LoadedModel,
    ids: Sequence[int],
    start: Prefix | None,
    groups: Sequence[Group],
) -> dict[Group, Tensor]:
    """Keys and values to start from; nothing for a random start."""
    if ids:
        return text_keys_values(loaded.model, ids)
    if not settings.init.startswith(TASK):
        return {}
    if start is None:
        raise TrainingError(f"init is {settings.init!r}, but no prefix to start from was given")
    name = settings.init.removeprefix(TASK)
    check_fits(start, loaded.spec, loaded.spec.max_positions)
    if start.prefix_length != settings.prefix_length:
        raise TrainingError(
            f"{name!r} has prefix length {start.prefix_length}; "
            f"expected {settings.prefix_length}, the one to train"
        )
    if set(start.groups) != set(groups):
        raise TrainingError(
            f"{name!r} is a prefix of {', '.join(sorted(start.groups))}; expected "
            f"{', '.join(sorted(groups))}, what is to be trained"
        )
    return {
        group: torch.stack([found.keys, found.values]).float().to(loaded.model.device)
        for group, found in start.groups.items()
    }


def initial_ids(
    settings: TrainSettings, loaded: LoadedModel, rows: Sequence[Row]
) -> tuple[int, ...]:
    """`prefix_length` token ids of the text to start from; none where no text is.

    Raises:
        TrainingError: the text has no tokens.
    """
    if settings.init == RANDOM or settings.init.startswith(TASK):
        return ()
    text = settings.init.removeprefix(TEXT) if settings.init else _rows_as_text(settings, rows)
    return _encode(loaded, text, settings.prefix_length)


def _encode(loaded: LoadedModel, text: str, length: int) -> tuple[int, ...]:
    """So many token ids, of the text or of its repetitions."""
    ids = loaded.tokenizer.encode(text)
    if not ids:
        raise TrainingError(f"the text to start from, {text!r}, has no tokens")
    repeats = -(-length // len(ids))
    return tuple((ids * repeats)[:length])


def _rows_as_text(settings: TrainSettings, rows: Sequence[Row]) -> str:
    wanted, text = max(settings.prefix_length, _SPREAD_TOKENS), ""
    for row in rows:
        text += (settings.template or SOURCE).replace(SOURCE, row.source)
        text += row.references[0] + "\n\n"
        if len(text) > wanted * _CHARS_PER_TOKEN:
            break
    return text
