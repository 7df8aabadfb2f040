"""The folder of a training run: what it trains, and what came out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from clients._errors import TrainingError
from clients.data import Row
from clients.training.baselines import save_baseline
from clients.training.encoder_decoder import EncoderDecoderPrefixModel
from clients.training.settings import TrainSettings
from clients.training.task_model import PrefixModel, TaskModel
from prefix_store.groups import KeysValues
from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix

PREFIX_FILE = "prefix.safetensors"
_RUN_FILE = "run.json"
_METHOD_NAMES = {"prefix": "prefix-tuning", "direct": "direct-prefix-tuning"}


def run_facts(settings: TrainSettings, loaded: LoadedModel, rows: Sequence[Row]) -> dict[str, str]:
    """What tells two runs apart; kept in the artefact too."""
    chosen = settings.model_copy(update={"learning_rate": settings.initial_learning_rate})
    values = chosen.model_dump(mode="json", exclude={"template"}, exclude_none=True)
    data = json.dumps([asdict(row) for row in rows], ensure_ascii=False).encode()
    return {
        **{name: str(value) for name, value in values.items()},
        "rows": str(len(rows)),
        "data_sha256": hashlib.sha256(data).hexdigest(),
        "base_fingerprint": loaded.spec.fingerprint,
    }


def open_run(folder: Path, facts: Mapping[str, str], *, resume: bool) -> None:
    """Make the folder of a new run, or see that one to be resumed is this very run.

    Raises:
        TrainingError: it is not.
    """
    file = folder / _RUN_FILE
    if file.exists():
        if not resume:
            raise TrainingError(
                f"{folder} holds a run already; resume it, or choose another folder"
            )
        found = json.loads(file.read_text(encoding="utf-8"))
        different = sorted(k for k in {*found, *facts} if found.get(k) != facts.get(k))
        if different:
            name = different[0]
            raise TrainingError(
                f"{folder} holds a run with {name} {found.get(name)!r}; this one has "
                f"{facts.get(name)!r}. A run is resumed with the same settings and rows."
            )
    elif resume:
        raise TrainingError(f"there is no run to resume in {folder}")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(dict(facts), indent=2), encoding="utf-8")


def save_result(
    model: TaskModel,
    settings: TrainSettings,
    loaded: LoadedModel,
    folder: Path,
    facts: Mapping[str, str],
) -> tuple[Path, Prefix | None]:
    """Write the prefix, or what a baseline trained; the file or folder, and the prefix if any."""
    if not isinstance(model, PrefixModel | EncoderDecoderPrefixModel):
        return save_baseline(model, settings, loaded, folder), None
    with torch.no_grad():
        # As it was used: in the dtype that the model computes in.
        found = {g: kv.to(loaded.model.dtype).cpu() for g, kv in model.keys_values().items()}
    prefix = Prefix(
        {group: KeysValues(keys, values, group) for group, (keys, values) in found.items()},
        method=_METHOD_NAMES[settings.method],
        base_model=loaded.spec.name,
        fingerprint=loaded.spec.fingerprint,
        template=settings.template,
        training=facts,
        encoder_decoder=loaded.spec.encoder is not None,
    )
    path = folder / PREFIX_FILE
    partial = path.with_suffix(".partial")
    partial.write_bytes(prefix.to_bytes())
    partial.replace(path)
    return path, prefix
