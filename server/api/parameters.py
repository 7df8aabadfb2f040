"""How a request asks for its text to be generated; names as in TGI."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from server.api.grammars import GrammarParameter

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_TOP_TOKENS = 20
MAX_BEST_OF = 20


class RequestModel(BaseModel):
    """A body that is refused when it has a field we do not know."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def only(default: object) -> AfterValidator:
    """Accept a parameter of TGI's that is not supported here, at the value that turns it off."""

    def check(value: object) -> object:
        if value not in (None, default):
            raise PydanticCustomError(
                "unsupported",
                "this server does not support it; leave it out or send {default}",
                {"default": str(default).lower()},
            )
        return value

    return AfterValidator(check)


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


class Parameters(RequestModel):
    """How to generate. Leaving a parameter out, or sending null, means its default."""

    max_new_tokens: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="Most tokens to generate. Default: 100, or fewer where fewer fit. With the "
        "prefix and the prompt it must not be over the server's length limit.",
        examples=[60],
    )
    do_sample: bool | None = Field(
        default=None,
        description="Draw each token from its distribution instead of taking the most likely one. "
        "Setting temperature, top_k, top_p, min_p or typical_p to something that has an effect "
        "also samples, as in TGI.",
        examples=[False],
    )
    temperature: float | None = Field(
        default=None,
        ge=0,
        le=100,
        description="Above 1 flattens the distribution, below 1 sharpens it. 0 means greedy "
        "decoding, whatever else is set (TGI refuses 0; most other servers take it so).",
        examples=[0.7],
    )
    top_k: int | None = Field(
        default=None,
        ge=0,
        le=1_000_000,
        description="Draw from the k most likely tokens only. 0: all.",
        examples=[50],
    )
    top_p: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Draw from the smallest set of tokens with at least this probability. 1: all.",
        examples=[0.95],
    )
    min_p: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Draw only from tokens at least this times as likely as the likeliest. 0: all.",
        examples=[0.05],
    )
    typical_p: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Locally typical sampling with this mass (arXiv:2202.00666). 1: off.",
        examples=[0.95],
    )
    repetition_penalty: float | None = Field(
        default=None,
        ge=0.01,
        le=100,
        description="Above 1 makes tokens of the prompt and the output less likely to come again "
        "(arXiv:1909.05858). 1: off.",
        examples=[1.1],
    )
    frequency_penalty: float | None = Field(
        default=None,
        ge=-2,
        le=2,
        description="Taken from a token's logit for each time it was generated. 0: off.",
        examples=[0.2],
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        lt=2**64,
        description="The same seed and request give the same sampled text whatever else runs. "
        "Default: a random one, told in `details.seed`.",
        examples=[42],
    )
    stop: list[StopString] | None = Field(
        default=None,
        max_length=MAX_STOP_STRINGS,
        description=f"Up to {MAX_STOP_STRINGS} texts of up to {MAX_STOP_CHARS} characters; the "
        "first to appear ends the generated text and is the last thing in it.",
        examples=[["\n\n"]],
    )
    num_beams: int | None = Field(
        default=None,
        ge=1,
        le=1_000,
        description="Follow so many hypotheses at once and answer with the best (beam search). "
        "Nothing is drawn then, and a stream's tokens come when it is found. At most the server's "
        "`max_beams`. 1: off.",
        examples=[1],
    )
    length_penalty: float | None = Field(
        default=None,
        ge=-10,
        le=10,
        description="With beams: a hypothesis' log-probability is divided by its length to this "
        "power, so that above 0 longer texts score better. Default: 1.",
        examples=[1.0],
    )
    early_stopping: bool | Literal["never"] | None = Field(
        default=None,
        description="With beams: true ends with `num_beams` finished hypotheses, false (the "
        'default) once the running ones score no better, "never" once they cannot at any length; '
        "as in transformers.",
        examples=[True],
    )
    no_repeat_ngram_size: int | None = Field(
        default=None,
        ge=0,
        le=1_000,
        description="No sequence of so many tokens comes twice. 0: off.",
        examples=[0],
    )
    min_new_tokens: int | None = Field(
        default=None,
        ge=0,
        le=1_000_000,
        description="The text does not end before so many tokens, unless by `stop`.",
        examples=[0],
    )
    ignore_eos: bool | None = Field(
        default=None,
        description="Go on past the end of the text, until `max_new_tokens` or a stop string; for "
        "measurements. The end-of-text token is then one of the tokens.",
        examples=[False],
    )
    ignore_eos_token: bool | None = Field(
        default=None,
        description="Another name for `ignore_eos`, for LoRAX's clients.",
        examples=[False],
    )
    truncate: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="Keep only so many tokens of the prompt, its last ones.",
        examples=[256],
    )
    return_full_text: bool | None = Field(
        default=None,
        description="Put the input in front of `generated_text`.",
        examples=[False],
    )
    details: bool | None = Field(
        default=None,
        description="Answer with `details`: every token with its log-probability, the seed, why "
        "it ended. A stream's last event always has details.",
        examples=[True],
    )
    top_n_tokens: int | None = Field(
        default=None,
        ge=0,
        le=MAX_TOP_TOKENS,
        description="Tell the n most likely tokens at each position, in `top_tokens`.",
        examples=[0],
    )
    adapter_id: str | None = Field(
        default=None,
        description="Another name for `task_id`, for TGI's clients.",
        examples=["e2e"],
    )
    best_of: int | None = Field(
        default=None,
        ge=1,
        le=MAX_BEST_OF,
        description="Generate so many and answer with the one of the highest mean log-probability; "
        "the others are in `details`. For sampling only, and not for streams.",
        examples=[1],
    )
    adapter_source: Annotated[str | None, only(None)] = Field(
        default=None, description="LoRAX's, not supported: null only.", examples=[None]
    )
    merged_adapters: Annotated[dict[str, Any] | None, only(None)] = Field(
        default=None, description="LoRAX's, not supported: null only.", examples=[None]
    )
    api_token: Annotated[str | None, only(None)] = Field(
        default=None, description="LoRAX's, not supported: null only.", examples=[None]
    )
    return_k_alternatives: Annotated[int | None, only(0)] = Field(
        default=None, description="LoRAX's, not supported: 0 or null only.", examples=[None]
    )
    response_format: Annotated[dict[str, Any] | None, only(None)] = Field(
        default=None,
        description="LoRAX's, not supported: null only; `grammar` does it.",
        examples=[None],
    )
    watermark: Annotated[bool | None, only(False)] = Field(
        default=None, description="Not supported: false or null only.", examples=[False]
    )
    decoder_input_details: bool | None = Field(
        default=None,
        description="With `details`: tell the prompt's tokens and their log-probabilities, too. "
        "Not for streams, and not for models with an encoder.",
        examples=[False],
    )
    grammar: GrammarParameter | None = Field(
        default=None,
        description="The form that the text must have: JSON by a schema, a regular expression, or "
        "one of some texts. Cut off at `max_new_tokens` it may not have it yet.",
    )
