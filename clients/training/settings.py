"""How to train: one immutable value, checked when it is made."""

from __future__ import annotations

import re
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from prefix_store.groups import Group
from prefix_store.model_loading import default_dtype
from prefix_store.prefix import check_template

Method = Literal["prefix", "direct", "finetune", "adapter", "lora", "prompt-tuning"]
PREFIX_METHODS = ("prefix", "direct")
"""Those that make a prefix; the others are baselines to compare with."""
_SOFT = (*PREFIX_METHODS, "prompt-tuning")

RANDOM = "random"
TEXT = "text:"
TASK = "task:"

_LEARNING_RATES: dict[Method, float] = {
    "prefix": 1e-3,
    "direct": 2e-2,
    "finetune": 5e-5,
    "adapter": 1e-3,
    "lora": 1e-3,
    "prompt-tuning": 3e-2,
}


class TrainSettings(BaseModel):
    """How to train.

    Attributes:
        method: `prefix`, keys and values computed by an MLP that is dropped afterwards (Li & Liang
            2021, section 4.3); `direct`, the keys and values themselves (Cartridges); or a
            baseline: `finetune`, `adapter` (Houlsby et al. 2019), `lora`, `prompt-tuning`.
        prefix_length: vectors of a prefix or soft prompt.
        init: where a prefix or soft prompt starts: `random`; `text:...`, that text's keys and
            values, repeated or cut to `prefix_length` tokens; `task:NAME`, a task's prefix; or
            empty, the first training rows as text.
        where: of an encoder-decoder model, the attention that gets a prefix; None for all three.
        freeze_first: keep the first vector of `direct` as it starts, for attention that rests
            there (Cartridges, section 3).
        template: text around the source; the target follows it.
        references: of each row, train on so many of its references, those most like its others;
            None for all.
        learning_rate: at the first step after `warmup`; None for the method's own.
        schedule, warmup: how the learning rate changes; the warm-up as a share of all steps.
        batch_size: rows in one forward pass.
        accumulate: forward passes in one step.
        epochs: passes over the training rows; `max_steps`, if given, counts instead.
        eval_steps: steps between two measurements on the dev rows, each with a checkpoint; None
            for a tenth of all.
        patience: measurements without a better dev loss after which training ends; 0 for never.
        dtype: that the model computes in; `auto` is bfloat16 where the hardware has it. With
            `finetune`, weights are float32 and only products are computed in it.
        checkpointing: compute activations again in the backward pass instead of keeping them.
        seed: of the initial weights and the order of the rows.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method = "prefix"
    prefix_length: int = Field(default=16, ge=1)
    init: str = ""
    where: tuple[Group, ...] | None = None
    freeze_first: bool = False
    template: str = "{source}\n"
    references: int | None = Field(default=None, ge=1)
    learning_rate: float | None = Field(default=None, gt=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = Field(default=0.0, ge=0, lt=1)
    batch_size: int = Field(default=8, ge=1)
    accumulate: int = Field(default=1, ge=1)
    epochs: float = Field(default=4.0, gt=0)
    max_steps: int | None = Field(default=None, ge=1)
    eval_steps: int | None = Field(default=None, ge=1)
    patience: int = Field(default=3, ge=0)
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    checkpointing: bool = False
    seed: int = 1

    @field_validator("where", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(value.split(",")) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not re.fullmatch(rf"|{RANDOM}|({TEXT}|{TASK}).+", self.init, re.DOTALL):
            raise ValueError(
                f"init is {self.init!r}; expected {RANDOM}, {TEXT}SOME TEXT or {TASK}NAME"
            )
        if self.freeze_first and self.method != "direct":
            raise ValueError("freeze_first is for the method direct")
        check_template(self.template)
        return self

    @property
    def initial_learning_rate(self) -> float:
        """The one given, or the method's own."""
        return self.learning_rate or _LEARNING_RATES[self.method]

    @property
    def has_prefix(self) -> bool:
        """Whether trained positions come before the text."""
        return self.method in _SOFT

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """What `dtype` means there."""
        return default_dtype(device) if self.dtype == "auto" else getattr(torch, self.dtype)
