"""OpenAI's shape of errors: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi.exceptions import RequestValidationError
from pydantic import Field

from prefix_store.errors import InvalidTaskIdError, UnknownTaskError
from server.api.errors import ErrorAnswer, answer_to
from server.api.schemas import AnswerModel
from server.engine.protocol import RequestTooLongError
from server.errors import AuthenticationError

_TYPES = {403: "permission_error", 429: "rate_limit_error"}


class OpenAIError(AnswerModel):
    """What is wrong."""

    message: str = Field(
        description="What is wrong, what was found, and what to do.",
        examples=["no task 'e3e': upload its prefix, or check the name"],
    )
    type: str = Field(description="The kind of error.", examples=["invalid_request_error"])
    param: str | None = Field(description="The field it is about.", examples=["model"])
    code: str | None = Field(description="The error, for programs.", examples=["model_not_found"])


class OpenAIErrorResponse(AnswerModel):
    """Why a request was refused or failed."""

    error: OpenAIError = Field(description="The error.")


@dataclass(frozen=True, slots=True)
class OpenAIErrorAnswer(ErrorAnswer):
    """How an error is answered; `error_type` is OpenAI's `code`."""

    param: str | None = None

    def body(self) -> str:
        """The JSON that OpenAI's clients read."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = OpenAIError(
            message=self.json_message,
            type=_TYPES.get(self.status, kind),
            param=self.param,
            code=self.error_type or None,
        )
        return OpenAIErrorResponse(error=error).model_dump_json()


def openai_answer_to(error: BaseException) -> OpenAIErrorAnswer:
    """How OpenAI's API answers any error."""
    answer = answer_to(error)
    status, code, param = answer.status, answer.error_type, None
    match error:
        case UnknownTaskError() | InvalidTaskIdError():
            status, code, param = 404, "model_not_found", "model"
        case AuthenticationError():
            code = "invalid_api_key"
        case RequestTooLongError():
            code = "context_length_exceeded"
        case RequestValidationError():
            param = _first_field(error)
    if code == "validation":
        code = ""
    status = 400 if status == 422 else status
    return OpenAIErrorAnswer(status, code, answer.message, answer.headers, param)


def _first_field(error: RequestValidationError) -> str | None:
    if isinstance(error.body, bytes):
        return None
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return None
    return ".".join(str(part) for part in first["loc"] if part != "body") or None
