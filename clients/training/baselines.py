"""Other ways to train a task, to compare prefixes with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from clients._errors import MissingExtraError, TrainingError
from clients.training.bottleneck import add_bottlenecks
from clients.training.encoder_decoder import EncoderDecoderModel
from clients.training.settings import TrainSettings
from clients.training.task_model import TaskModel
from prefix_store.model_loading import LoadedModel

_BOTTLENECK = 16
_LORA_RANK = 8


def build_baseline(settings: TrainSettings, loaded: LoadedModel, ids: Sequence[int]) -> TaskModel:
    """The model of `settings.method`, which is none that makes a prefix.

    Args:
        ids: tokens whose embeddings a soft prompt starts as; none for random ones.

    Raises:
        MissingExtraError: PEFT is needed and not installed.
        TrainingError: the model is not made for the method.
    """
    model, has_encoder = loaded.model, loaded.spec.encoder is not None
    if settings.method == "finetune":
        trained = EncoderDecoderModel if has_encoder else TaskModel
        return trained(model.requires_grad_(True))
    if has_encoder:
        raise TrainingError(
            f"{loaded.spec.name!r} has an encoder, and {settings.method} is for decoder-only "
            "models; expected prefix, direct or finetune"
        )
    if settings.method == "adapter":
        return AdapterModel(model)
    if settings.method == "lora":
        rank = {"r": _LORA_RANK, "lora_alpha": 2 * _LORA_RANK}
        return PeftBaseline(model, "LoraConfig", target_modules=_attention(model), **rank)
    return PromptModel(model, settings, ids)


def save_baseline(
    model: TaskModel, settings: TrainSettings, loaded: LoadedModel, folder: Path
) -> Path:
    """Write what was trained, in the form that others read.

    Returns:
        A folder with a whole model for `finetune` and with a PEFT adapter for `lora` and
        `prompt-tuning`; a file for `adapter`.
    """
    if isinstance(model, PromptModel):
        # As servers name the model, who take soft prompts: PEFT would name the folder it is in.
        model.peft.active_peft_config.base_model_name_or_path = loaded.spec.name
    if isinstance(model, PeftBaseline):
        model.peft.save_pretrained(folder / "peft")
        return folder / "peft"
    if isinstance(model, AdapterModel):
        save_file(model.state_dict(), folder / "adapter.safetensors")
        return folder / "adapter.safetensors"
    loaded.model.save_pretrained(folder / "model")
    loaded.tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def _attention(model: PreTrainedModel) -> list[str] | None:
    """Every attention projection, where they have their usual names; None for PEFT's choice."""
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return sorted(names & {"q_proj", "k_proj", "v_proj", "o_proj"}) or None


class AdapterModel(TaskModel):
    """A frozen model with bottleneck adapters in it."""

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__(base.requires_grad_(False))
        self.adapters = add_bottlenecks(base, _BOTTLENECK)


class PeftBaseline(TaskModel):
    """A frozen model with an adapter of PEFT's."""

    peft: Any

    def __init__(self, base: PreTrainedModel, kind: str, **config: Any) -> None:
        super().__init__(base)
        try:
            import peft  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise MissingExtraError(f"the method {kind}", error.name, "train") from error
        try:
            made = getattr(peft, kind)(task_type="CAUSAL_LM", **config)
            self.peft = peft.get_peft_model(base, made)
        except ValueError as error:
            raise TrainingError(f"PEFT cannot adapt {type(base).__name__}: {error}") from error


class PromptModel(PeftBaseline):
    """A frozen model behind a soft prompt (Lester et al. 2021)."""

    def __init__(self, base: PreTrainedModel, settings: TrainSettings, ids: Sequence[int]) -> None:
        super().__init__(base, "PromptTuningConfig", num_virtual_tokens=settings.prefix_length)
        if ids:
            (prompt,) = self.peft.prompt_encoder.parameters()
            embed = base.get_input_embeddings()
            with torch.no_grad():
                prompt.copy_(embed(torch.tensor(ids, device=base.device)))

    def inputs(self, input_ids: Tensor) -> dict[str, Any]:
        embeddings = self.base.get_input_embeddings()(input_ids)
        prompt = self.peft.get_prompt(batch_size=len(input_ids)).to(embeddings.dtype)
        return {"inputs_embeds": torch.cat([prompt, embeddings], dim=1), "use_cache": False}
