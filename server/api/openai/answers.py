"""What OpenAI's clients read. https://platform.openai.com/docs/api-reference"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from server.api.schemas import VERSION_EXAMPLE, AnswerModel

FinishReason = Literal["stop", "length"]

Id = Annotated[str, Field(description="A name of its own.", examples=["cmpl-5f0c"])]
Created = Annotated[int, Field(description="In unix seconds.", examples=[1767225600])]
ModelName = Annotated[str, Field(description="As it was asked for.", examples=["e2e"])]
Fingerprint = Annotated[
    str,
    Field(description="The prefix's version, or the base model's.", examples=[VERSION_EXAMPLE]),
]
Index = Annotated[
    int, Field(description="Number of the prompt times `n`, and of its text.", examples=[0])
]
End = Annotated[
    FinishReason | None,
    Field(
        description="`length`: the limit of tokens; `stop`: the model ended the text, or a stop "
        "string came. null where the text goes on.",
        examples=["stop"],
    ),
]
LogProbability = Annotated[
    float,
    Field(
        description="Natural logarithm of its probability under the model with the prefix, before "
        "penalties and sampling; -9999 for what cannot come.",
        examples=[-0.18],
    ),
]


def _is_none(value: object) -> bool:
    return value is None


class UsageAnswer(AnswerModel):
    """Tokens of a request."""

    prompt_tokens: int = Field(
        description="Of each prompt once, without the prefix.", examples=[23]
    )
    completion_tokens: int = Field(
        description="Of all texts generated, `best_of`'s too.", examples=[24]
    )
    total_tokens: int = Field(description="Their sum.", examples=[47])


class CompletionLogprobs(AnswerModel):
    """Of each token in turn."""

    tokens: list[str] = Field(
        description="What it adds to the text; a special token's name.", examples=[["The"]]
    )
    token_logprobs: list[float | None] = Field(
        description="Its log-probability; null for a prompt's first token.", examples=[[-0.18]]
    )
    top_logprobs: list[dict[str, float] | None] = Field(
        description="The likeliest tokens, and the token itself.", examples=[[{"The": -0.18}]]
    )
    text_offset: list[int] = Field(
        description="Where it begins in the text, in characters.", examples=[[0]]
    )


class CompletionChoice(AnswerModel):
    """A text, or a part of one."""

    index: Index
    text: str = Field(description="The text.", examples=["The Eagle is a coffee shop."])
    logprobs: CompletionLogprobs | None = Field(description="Where they are asked for.")
    finish_reason: End


class Generated(AnswerModel):
    """What every answer with generated text has."""

    id: Id
    created: Created
    model: ModelName
    system_fingerprint: Fingerprint


class Completion(Generated):
    """Texts, or a chunk of a stream."""

    object: Literal["text_completion"] = Field(
        default="text_completion", description="What this is.", examples=["text_completion"]
    )
    choices: list[CompletionChoice] = Field(description="The texts.")
    usage: UsageAnswer | None = Field(
        default=None, description="Of a stream, in the last chunk if it is asked for."
    )


class TopLogprob(AnswerModel):
    """A token that could have been chosen."""

    token: str = Field(description="Its text; a special token's name.", examples=["The"])
    logprob: LogProbability
    bytes: list[int] | None = Field(
        description="Its text in UTF-8; null for special tokens and halves of characters.",
        examples=[[84, 104, 101]],
    )


class ChatLogprob(TopLogprob):
    """A token that was chosen."""

    top_logprobs: list[TopLogprob] = Field(description="The likeliest in its place.")


class ChatLogprobs(AnswerModel):
    """Of the tokens of a message."""

    content: list[ChatLogprob] = Field(description="Each token in turn.")
    refusal: None = Field(default=None, description="Always null.", examples=[None])


class AnswerMessage(AnswerModel):
    """What the model says."""

    role: Literal["assistant"] = Field(
        default="assistant", description="Who speaks.", examples=["assistant"]
    )
    content: str = Field(description="The text.", examples=["Paris."])
    refusal: None = Field(default=None, description="Always null.", examples=[None])


class ChatChoice(AnswerModel):
    """One answer."""

    index: Index
    message: AnswerMessage = Field(description="The answer itself.")
    logprobs: ChatLogprobs | None = Field(description="Where they are asked for.")
    finish_reason: End


class ChatCompletion(Generated):
    """Answers to a conversation."""

    object: Literal["chat.completion"] = Field(
        default="chat.completion", description="What this is.", examples=["chat.completion"]
    )
    choices: list[ChatChoice] = Field(description="The answers.")
    usage: UsageAnswer = Field(description="The request's tokens.")


class Delta(AnswerModel):
    """What a chunk adds to a message; the first has the role."""

    role: Literal["assistant"] | None = Field(
        default=None, exclude_if=_is_none, description="Who speaks.", examples=["assistant"]
    )
    content: str | None = Field(
        default=None, exclude_if=_is_none, description="More of the text.", examples=["Paris"]
    )


class ChunkChoice(AnswerModel):
    """A part of one answer."""

    index: Index
    delta: Delta = Field(description="What it adds.")
    logprobs: ChatLogprobs | None = Field(description="Where they are asked for.")
    finish_reason: End


class ChatCompletionChunk(Generated):
    """A chunk of a stream."""

    object: Literal["chat.completion.chunk"] = Field(
        default="chat.completion.chunk",
        description="What this is.",
        examples=["chat.completion.chunk"],
    )
    choices: list[ChunkChoice] = Field(description="The answers' parts.")
    usage: UsageAnswer | None = Field(
        default=None, description="In the last chunk, if it is asked for."
    )


class ModelAnswer(AnswerModel):
    """What can be named as `model`."""

    id: str = Field(description="A task, or the base model's name.", examples=["e2e"])
    object: Literal["model"] = Field(
        default="model", description="What this is.", examples=["model"]
    )
    created: Created
    owned_by: str = Field(description="Whose it is.", examples=["prefixserve"])
    root: str = Field(
        description="A task's version, or the base model's fingerprint.", examples=[VERSION_EXAMPLE]
    )
    parent: str | None = Field(description="A task's base model.", examples=["smollm2-135m"])
    max_model_len: int = Field(
        description="Limit of prefix + prompt + new tokens.", examples=[2048]
    )


class ModelList(AnswerModel):
    """The base model, then the tasks by name."""

    object: Literal["list"] = Field(default="list", description="What this is.", examples=["list"])
    data: list[ModelAnswer] = Field(description="The models.")
