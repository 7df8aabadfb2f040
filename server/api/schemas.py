"""What goes over the wire. Names follow Hugging Face text-generation-inference (TGI)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidatorFunctionWrapHandler
from pydantic.functional_validators import WrapValidator
from pydantic_core import PydanticCustomError

from server.api.parameters import MAX_BEST_OF, MAX_STOP_STRINGS, Parameters, RequestModel

MAX_INPUTS = 128
MAX_USER_CHARS = 256
MAX_SHARED_WITH = 1000

E2E_EXAMPLE = "name : The Eagle | Type : coffee shop | food : Japanese | area : riverside"
VERSION_EXAMPLE = "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"


class AnswerModel(BaseModel):
    """A body we send."""

    model_config = ConfigDict(frozen=True)


def _one_message(value: object, handler: ValidatorFunctionWrapHandler) -> object:
    try:
        return handler(value)
    except ValueError as error:
        raise PydanticCustomError(
            "inputs",
            "expected a text that is not empty, or a list of 1 to {most} of them",
            {"most": MAX_INPUTS},
        ) from error


Text = Annotated[str, Field(min_length=1)]
Inputs = Annotated[
    Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS)],
    WrapValidator(_one_message),
]


class GenerateRequest(RequestModel):
    """A text to continue, or several."""

    inputs: Inputs = Field(
        description=f"The input, put into the task's template; or a list of 1 to {MAX_INPUTS}, "
        "which is answered by a list of the same length, all or nothing.",
        examples=[E2E_EXAMPLE],
    )
    task_id: str | None = Field(
        default=None,
        description="The task whose prefix to use. Default: none, the bare base model.",
        examples=["e2e"],
    )
    user: str | None = Field(
        default=None,
        max_length=MAX_USER_CHARS,
        description="Whoever the text is for, in any words. Where a task's requests are split "
        "among versions, the same user always gets the same version.",
        examples=["customer-4711"],
    )
    parameters: Parameters | None = Field(
        default=None,
        description="How to generate.",
        examples=[{"max_new_tokens": 60, "details": True}],
    )
    stream: bool | None = Field(
        default=None,
        description="Answer token by token, as server-sent events. For a single input only.",
        examples=[False],
    )


class Token(AnswerModel):
    """A token and how likely it was."""

    id: int = Field(description="Its number in the tokenizer.", examples=[504])
    text: str = Field(
        description="The text it adds; empty while a character is incomplete.", examples=["The"]
    )
    logprob: float = Field(
        description="Natural logarithm of its probability under the model with the prefix, before "
        "penalties and sampling.",
        examples=[-0.18],
    )
    special: bool = Field(
        description="True for tokens such as the end of text, which are not in `generated_text`.",
        examples=[False],
    )


class PrefillToken(AnswerModel):
    """A token of the prompt."""

    id: int = Field(description="Its number in the tokenizer.", examples=[504])
    text: str = Field(description="The text it adds.", examples=["The"])
    logprob: float | None = Field(
        description="Natural logarithm of its probability after the prefix and the prompt before "
        "it; null for the first token.",
        examples=[-3.2],
    )


class StreamDetails(AnswerModel):
    """How a generation went."""

    finish_reason: Literal["length", "eos_token", "stop_sequence"] = Field(
        description="`length`: max_new_tokens were generated; `eos_token`: the model ended the "
        "text; `stop_sequence`: a stop string appeared.",
        examples=["eos_token"],
    )
    generated_tokens: int = Field(description="Number of tokens generated.", examples=[24])
    seed: int | None = Field(
        description="What sampling was seeded with; null for greedy decoding.", examples=[42]
    )
    input_length: int = Field(
        description="Tokens of the prompt, the same as `prompt_tokens`.", examples=[23]
    )
    task_id: str | None = Field(description="The task.", examples=["e2e"])
    version: str | None = Field(
        description="The prefix that was used, by the SHA-256 of its artefact.",
        examples=[VERSION_EXAMPLE],
    )
    prefix_tokens: int = Field(description="Positions the prefix takes.", examples=[16])
    prompt_tokens: int = Field(description="Tokens of the prompt.", examples=[23])


class SequenceDetails(AnswerModel):
    """One that `best_of` generated and did not choose."""

    generated_text: str = Field(description="Its text.", examples=["The Eagle is one."])
    finish_reason: Literal["length", "eos_token", "stop_sequence"] = Field(
        description="As in `details`.", examples=["length"]
    )
    generated_tokens: int = Field(description="Number of tokens generated.", examples=[24])
    seed: int | None = Field(description="What it was seeded with.", examples=[43])
    prefill: list[PrefillToken] = Field(description="Always empty: the prompt is the same.")
    tokens: list[Token] = Field(description="Every generated token.")
    top_tokens: list[list[Token]] = Field(default_factory=list, description="As in `details`.")


class Details(StreamDetails):
    """How a generation went, token by token."""

    prefill: list[PrefillToken] = Field(
        description="With `decoder_input_details`, the prompt's tokens; else empty.", examples=[[]]
    )
    tokens: list[Token] = Field(
        description="Every generated token.",
        examples=[[{"id": 504, "text": "The", "logprob": -0.18, "special": False}]],
    )
    top_tokens: list[list[Token]] = Field(
        default_factory=list,
        description="With `top_n_tokens`: for each position the most likely tokens, likeliest "
        "first.",
        examples=[[[{"id": 504, "text": "The", "logprob": -0.18, "special": False}]]],
    )
    best_of_sequences: list[SequenceDetails] = Field(
        default_factory=list, description="With `best_of`: the others, the best first."
    )


class GenerateResponse(AnswerModel):
    """A finished text."""

    generated_text: str = Field(
        description="The text generated, without special tokens.",
        examples=["The Eagle is a Japanese coffee shop by the riverside."],
    )
    task_id: str | None = Field(
        description="The task; null for the bare base model.", examples=["e2e"]
    )
    version: str | None = Field(
        description="The prefix that was used, by the SHA-256 of its artefact.",
        examples=[VERSION_EXAMPLE],
    )
    prefix_tokens: int = Field(description="Positions the prefix takes.", examples=[16])
    prompt_tokens: int = Field(description="Tokens of the prompt.", examples=[23])
    details: Details | None = Field(
        default=None, description="Only when `parameters.details` asks for it."
    )


class StreamEvent(AnswerModel):
    """One token of a stream."""

    index: int = Field(description="The token's number, from 1.", examples=[1])
    token: Token = Field(description="The token.")
    top_tokens: list[Token] = Field(
        default_factory=list, description="With `top_n_tokens`: the most likely tokens here."
    )
    generated_text: str | None = Field(
        description="The whole text, on the last event only.",
        examples=["The Eagle is a Japanese coffee shop by the riverside."],
    )
    details: StreamDetails | None = Field(description="On the last event only.")


class TextUpload(RequestModel):
    """A prefix from plain text."""

    text: Text = Field(
        description="A prompt. The server runs it through the model once and keeps the keys and "
        "values as the task's prefix.",
        examples=["Classify the sentiment of each review as positive or negative.\n"],
    )


class TaskCount(AnswerModel):
    """Tasks of a tenant."""

    tasks: int = Field(description="How many there are.", examples=[3])


class TaskResponse(AnswerModel):
    """A task and the prefix it points at."""

    task_id: str = Field(description="The task's name.", examples=["e2e"])
    version: str = Field(
        description="`sha256:` and the hex digest of the stored artefact's bytes.",
        examples=[VERSION_EXAMPLE],
    )
    prefix_length: int = Field(description="Positions the prefix takes.", examples=[16])
    bytes: int = Field(description="Size of the stored artefact.", examples=[369_120])
    method: str = Field(
        description="How the prefix was made: `prefix-tuning`, `cartridge`, `text`, ...",
        examples=["prefix-tuning"],
    )
    base_model: str = Field(
        description="The base model it was made for, as its maker names it; may be empty.",
        examples=["smollm2-135m"],
    )
    template: str = Field(
        description="Text around each input, with `{source}` where the input goes; empty for the "
        "input as it is.",
        examples=["{source}\nSentence:"],
    )
    created_at: float = Field(
        description="When it was uploaded, in unix seconds.", examples=[1767225600.0]
    )
    split: dict[str, int] = Field(
        default_factory=dict,
        description="Percent of the requests by version; empty when all go to `version`.",
        examples=[{}],
    )
    pinned: bool = Field(
        default=False, description="Whether every server keeps it loaded.", examples=[False]
    )
    shared_with: list[str] = Field(
        default_factory=list,
        description="The other tenants that may use it; only `public` for all of them.",
        examples=[[]],
    )


class VersionResponse(AnswerModel):
    """One version of a task."""

    version: str = Field(
        description="`sha256:` and the hex digest of the stored artefact's bytes.",
        examples=[VERSION_EXAMPLE],
    )
    active: bool = Field(description="Whether requests get it by default.", examples=[True])
    percent: int = Field(description="Share of the requests that get it.", examples=[100])
    prefix_length: int = Field(description="Positions the prefix takes.", examples=[16])
    bytes: int = Field(description="Size of the stored artefact.", examples=[369_120])
    method: str = Field(description="How the prefix was made.", examples=["prefix-tuning"])
    base_model: str = Field(
        description="The base model it was made for; may be empty.", examples=["smollm2-135m"]
    )
    created_at: float = Field(
        description="When the task was given it, in unix seconds.", examples=[1767225600.0]
    )


class Activation(RequestModel):
    """Which version to activate."""

    version: Text = Field(description="One that the task keeps.", examples=[VERSION_EXAMPLE])


class Sharing(RequestModel):
    """With whom a task is shared."""

    tenants: list[Text] = Field(
        max_length=MAX_SHARED_WITH,
        description="Names of tenants, or `public` for all of them; `[]` ends the sharing.",
        examples=[["public"]],
    )


class InputToken(AnswerModel):
    """A token of a text."""

    id: int = Field(description="Its number in the tokenizer.", examples=[504])
    text: str = Field(description="The part of the text that it stands for.", examples=["The"])
    start: int = Field(description="Where that begins, in characters.", examples=[0])
    stop: int = Field(description="Where that ends.", examples=[3])


class InfoResponse(AnswerModel):
    """What this server runs."""

    model_id: str = Field(description="The base model.", examples=["smollm2-135m"])
    model_sha: str = Field(
        description="Fingerprint of its weights; a prefix made for this model carries it.",
        examples=["6b1f0c5e8d"],
    )
    model_dtype: str = Field(description="What it computes in.", examples=["bfloat16"])
    model_device_type: str = Field(description="Where it runs.", examples=["cpu"])
    num_layers: int = Field(description="Layers of a prefix.", examples=[30])
    num_kv_heads: int = Field(description="Key-value heads of a prefix.", examples=[3])
    head_dim: int = Field(description="Numbers per head of a prefix.", examples=[64])
    max_total_tokens: int = Field(
        description="Limit of prefix + prompt + max_new_tokens.", examples=[2048]
    )
    max_concurrent_requests: int = Field(
        description="Requests that run or wait; more are answered 429.", examples=[576]
    )
    max_client_batch_size: int = Field(description="Longest list of inputs.", examples=[MAX_INPUTS])
    max_stop_sequences: int = Field(description="Most stop strings.", examples=[MAX_STOP_STRINGS])
    max_best_of: int = Field(description="Largest `best_of`.", examples=[MAX_BEST_OF])
    version: str = Field(description="Version of the server.", examples=["0.1.0"])


class HealthResponse(AnswerModel):
    """Whether the server does its work."""

    status: Literal["live", "ready"] = Field(description="What was asked.", examples=["live"])


class ReadyResponse(AnswerModel):
    """Whether the server takes requests, and which."""

    status: Literal["ready"] = Field(description="What was asked.", examples=["ready"])
    store: Literal["connected", "away"] = Field(
        description="`away` while the prefix store does not answer: tasks that are loaded go on, "
        "and nothing can be changed.",
        examples=["connected"],
    )


class ErrorResponse(AnswerModel):
    """Why a request was refused or failed."""

    error: str = Field(
        description="What is wrong, what was found, and what to do.",
        examples=["no task 'e3e': upload its prefix, or check the name"],
    )
    error_type: str = Field(
        description="The kind of error, for programs: `validation`, `not_found`, `overloaded`, "
        "`unavailable`, `too_large`, `generation`, ...",
        examples=["not_found"],
    )
