"""What is to be known of a base model whose weights another program loads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from prefix_store.base_model import FINGERPRINT_SAMPLE, BaseModelSpec, fingerprint, fingerprint_of
from prefix_store.errors import ModelLoadError
from prefix_store.model_loading import READ_ERRORS, model_source, unreadable

_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A decoder-only base model on disk.

    Attributes:
        folder: has config.json and safetensors weights.
        generation: how its texts end.
        dtype, device: what it will be loaded in and on.
    """

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    spec: BaseModelSpec
    generation: GenerationConfig
    dtype: torch.dtype
    device: torch.device


def find_base_model(
    name: str, *, device: torch.device, dtype: torch.dtype, cache_dir: Path
) -> ModelFiles:
    """Everything about the model called `name` but its weights; a hub model is downloaded.

    Args:
        as `load_base_model`'s.

    Raises:
        ModelLoadError: there is no such model, it cannot be read, or it has an encoder.
    """
    source = Path(model_source(name, cache_dir))
    try:
        if not source.is_dir():
            source = Path(snapshot_download(str(source), allow_patterns=list(_FILES)))
        tokenizer = AutoTokenizer.from_pretrained(source)
        config = AutoConfig.from_pretrained(source)
        if config.is_encoder_decoder:
            raise ModelLoadError(
                f"{name!r} is an encoder-decoder model, which vLLM does not run; "
                "start with --engine native"
            )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        generation = _generation_config(source, model)
        spec = BaseModelSpec.from_model(model, name, _fingerprint(source, model))
    except READ_ERRORS as error:
        raise unreadable(name, error) from error
    return ModelFiles(source, tokenizer, spec, generation, dtype, device)


def _generation_config(folder: Path, model: PreTrainedModel) -> GenerationConfig:
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(model.config)


def _fingerprint(folder: Path, model: PreTrainedModel) -> str:
    """The fingerprint of the weights in `folder`, whose names and shapes `model` has."""
    files = _file_of_each(folder)
    parameters = {name: tuple(value.shape) for name, value in model.named_parameters()}
    if parameters.keys() <= files.keys():
        return fingerprint_of(_samples(files, parameters))
    # transformers renames some checkpoints' tensors as it loads them.
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True)
    return fingerprint(loaded)


def _file_of_each(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def _samples(
    files: dict[str, Path], parameters: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, tuple[int, ...], torch.Tensor]]:
    for path in set(files.values()):
        with safe_open(path, "pt") as file:
            for name in [name for name in parameters if files[name] == path]:
                values = file.get_slice(name)
                rows = -(-FINGERPRINT_SAMPLE // _row_numbers(parameters[name]))
                yield name, tuple(values.get_shape()), values[:rows].flatten()[:FINGERPRINT_SAMPLE]


def _row_numbers(shape: tuple[int, ...]) -> int:
    return max(1, int(torch.Size(shape[1:]).numel()))
