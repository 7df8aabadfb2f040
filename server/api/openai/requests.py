"""What OpenAI's clients send. https://platform.openai.com/docs/api-reference"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidatorFunctionWrapHandler
from pydantic.functional_validators import WrapValidator
from pydantic_core import PydanticCustomError

from server.api.openai.formats import FormatOptions
from server.api.parameters import (
    MAX_BEST_OF,
    MAX_STOP_STRINGS,
    MAX_TOP_TOKENS,
    RequestModel,
    StopString,
    only,
)
from server.api.schemas import E2E_EXAMPLE, MAX_INPUTS, MAX_USER_CHARS


def _one_message(value: object, handler: ValidatorFunctionWrapHandler) -> object:
    try:
        return handler(value)
    except ValueError as error:
        raise PydanticCustomError(
            "prompt",
            "expected a text, a list of token ids that is not empty, or a list of 1 to {most} of "
            "either",
            {"most": MAX_INPUTS},
        ) from error


TokenIds = Annotated[list[int], Field(min_length=1)]
CompletionPrompt = Annotated[
    str
    | TokenIds
    | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_INPUTS)],
    WrapValidator(_one_message),
]
Stop = Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)]


class StreamOptions(RequestModel):
    """What a stream tells besides its text."""

    include_usage: bool | None = Field(
        default=None,
        description="A last chunk tells the usage of the whole request.",
        examples=[True],
    )


class GenerationOptions(FormatOptions):
    """What completions and chat completions have in common. null is the default."""

    model: str = Field(
        min_length=1,
        max_length=512,
        description="A task, or the base model's name for the bare base model.",
        examples=["e2e"],
    )
    max_tokens: int | None = Field(
        default=None, ge=0, le=1_000_000, description="Most tokens to generate.", examples=[60]
    )
    temperature: float | None = Field(
        default=None,
        ge=0,
        le=100,
        description="Default: 1, which samples. 0 is greedy decoding.",
        examples=[0.7],
    )
    top_p: float | None = Field(default=None, ge=0, le=1, description="Default: 1.", examples=[1])
    frequency_penalty: float | None = Field(
        default=None,
        ge=-2,
        le=2,
        description="Taken from a token's logit for each time it was generated.",
        examples=[0],
    )
    presence_penalty: float | None = Field(
        default=None,
        ge=-2,
        le=2,
        description="Taken from the logits of tokens that were generated.",
        examples=[0],
    )
    n: int | None = Field(
        default=None,
        ge=1,
        le=MAX_INPUTS,
        description="Texts for each prompt, with the seeds `seed`, `seed` + 1, ...",
        examples=[1],
    )
    seed: int | None = Field(
        default=None,
        ge=-(2**63),
        lt=2**63,
        description="The same seed and request give the same text whatever else runs.",
        examples=[42],
    )
    stop: StopString | Stop | None = Field(
        default=None,
        description=f"Up to {MAX_STOP_STRINGS} texts; the first to appear ends the text, and is "
        "left out of it.",
        examples=[["\n\n"]],
    )
    stream: bool | None = Field(
        default=None, description="Answer in chunks, as server-sent events.", examples=[False]
    )
    stream_options: StreamOptions | None = Field(default=None, description="For streams only.")
    user: str | None = Field(
        default=None,
        max_length=MAX_USER_CHARS,
        description="Whoever the text is for. Where a task's requests are split among versions, "
        "the same user always gets the same version.",
        examples=["customer-4711"],
    )
    logit_bias: Annotated[dict[str, Any] | None, only({})] = Field(
        default=None, description="Not supported: empty or null only.", examples=[None]
    )
    top_k: int | None = Field(
        default=None,
        ge=-1,
        le=1_000_000,
        description="As in vLLM: draw from the k most likely tokens only.",
        examples=[50],
    )
    min_p: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="As in vLLM: only tokens this times as likely as the likeliest.",
        examples=[0.05],
    )
    repetition_penalty: float | None = Field(
        default=None,
        ge=0.01,
        le=100,
        description="As in vLLM: above 1, tokens of the prompt and the output come less.",
        examples=[1.1],
    )
    ignore_eos: bool | None = Field(
        default=None, description="As in vLLM: go on past the end.", examples=[False]
    )


class CompletionRequest(GenerationOptions):
    """Texts to continue."""

    prompt: CompletionPrompt = Field(
        description="A text, which is put into the task's template; or token ids, taken as they "
        f"are; or a list of 1 to {MAX_INPUTS} of either.",
        examples=[E2E_EXAMPLE],
    )
    max_tokens: int | None = Field(
        default=None,
        ge=0,
        le=1_000_000,
        description="Default: 16. 0, with `echo`, scores the prompt and generates nothing.",
        examples=[60],
    )
    best_of: int | None = Field(
        default=None,
        ge=1,
        le=MAX_BEST_OF,
        description="Generate so many and answer with the `n` of the highest mean "
        "log-probability. Default: `n`.",
        examples=[1],
    )
    echo: bool | None = Field(
        default=None, description="Put the prompt in front of the text.", examples=[False]
    )
    logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_TOP_TOKENS,
        description="Tell each token's log-probability, and this many alternatives; with `echo`, "
        "the prompt's too.",
        examples=[None],
    )
    suffix: Annotated[str | None, only("")] = Field(
        default=None, description="Not supported: empty or null only.", examples=[None]
    )


class TextPart(RequestModel):
    """A part of a message's content."""

    type: Literal["text"] = Field(description="Texts only.", examples=["text"])
    text: str = Field(description="The text.", examples=["What is the capital of France?"])


class ChatMessage(RequestModel):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="`developer` is read as `system`.", examples=["user"]
    )
    content: str | list[TextPart] = Field(
        description="A text, or parts of one.", examples=["What is the capital of France?"]
    )
    name: str | None = Field(
        default=None, max_length=64, description="Not shown to the model.", examples=[None]
    )


class ChatRequest(GenerationOptions):
    """A conversation to continue."""

    messages: list[ChatMessage] = Field(
        min_length=1,
        description="Written for the model by its own chat template; a task's template is not "
        "used.",
        examples=[[{"role": "user", "content": "What is the capital of France?"}]],
    )
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="Old name of `max_completion_tokens`.",
        examples=[60],
    )
    max_completion_tokens: int | None = Field(
        default=None, ge=1, le=1_000_000, description="Default: as many as fit.", examples=[60]
    )
    logprobs: bool | None = Field(
        default=None, description="Tell each token's log-probability.", examples=[False]
    )
    top_logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_TOP_TOKENS,
        description="With `logprobs`: tell this many alternatives, too.",
        examples=[None],
    )
    tools: Annotated[list[Any] | None, only([])] = Field(
        default=None, description="Not supported: empty or null only.", examples=[None]
    )
