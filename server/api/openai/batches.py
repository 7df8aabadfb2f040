"""OpenAI's batches: https://platform.openai.com/docs/api-reference/batch"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import Field

from server.api.dependencies import GenerateCaller, ServicesDep
from server.api.openai.batch_lines import Endpoint
from server.api.parameters import RequestModel
from server.api.schemas import AnswerModel
from server.batches.records import BatchRecord, Counts, Status
from server.batches.runner import BatchRunner

router = APIRouter(prefix="/v1/batches", tags=["Batches"])


_Key = Annotated[str, Field(max_length=64)]
_Value = Annotated[str, Field(max_length=512)]


class BatchRequest(RequestModel):
    """A batch to run."""

    input_file_id: str = Field(
        max_length=64,
        description="A file of the purpose batch.",
        examples=["file-0123456789abcdef0123456789abcdef"],
    )
    endpoint: Endpoint = Field(
        description="What every line's url is.", examples=["/v1/completions"]
    )
    completion_window: Literal["24h"] = Field(
        description="After it the batch expires.", examples=["24h"]
    )
    metadata: dict[_Key, _Value] | None = Field(
        default=None, max_length=16, description="Kept and told.", examples=[{"run": "7"}]
    )


class BatchError(AnswerModel):
    """Why a batch failed."""

    code: Literal["batch_failed"] = Field(
        default="batch_failed", description="The kind of error.", examples=["batch_failed"]
    )
    message: str = Field(
        description="What is wrong, and what to do.",
        examples=["line 3 has the custom_id 'a' of line 1; every line needs its own"],
    )
    param: None = Field(default=None, description="Always null.", examples=[None])
    line: None = Field(
        default=None, description="Always null: the message names it.", examples=[None]
    )


class BatchErrors(AnswerModel):
    """Why a batch failed, as a list."""

    object: Literal["list"] = Field(default="list", description="Its kind.", examples=["list"])
    data: list[BatchError] = Field(description="One error.")


def _time(of: str) -> Any:
    return Field(description=f"When it {of}, in unix seconds.", examples=[1_764_288_000])


class BatchAnswer(AnswerModel):
    """A batch. The times of what has not happened are null."""

    id: str = Field(description="Its name.", examples=["batch-0123456789abcdef0123456789abcdef"])
    object: Literal["batch"] = Field(default="batch", description="Its kind.", examples=["batch"])
    endpoint: str = Field(description="What its lines call.", examples=["/v1/completions"])
    errors: BatchErrors | None = Field(description="Why it failed, if it did.")
    input_file_id: str = Field(
        description="Its requests.", examples=["file-0123456789abcdef0123456789abcdef"]
    )
    completion_window: Literal["24h"] = Field(
        default="24h", description="After it the batch expires.", examples=["24h"]
    )
    status: Status = Field(description="Where it is.", examples=["in_progress"])
    output_file_id: str | None = Field(
        description="Of the lines answered with status 200.",
        examples=["file-0123456789abcdef0123456789abcdef"],
    )
    error_file_id: str | None = Field(description="Of the other lines.", examples=[None])
    created_at: int = _time("was made")
    in_progress_at: int | None = _time("began to run")
    expires_at: int = _time("expires")
    finalizing_at: int | None = _time("had answered its lines")
    completed_at: int | None = _time("ended")
    failed_at: int | None = _time("failed")
    expired_at: int | None = _time("expired")
    cancelling_at: int | None = _time("was asked to stop")
    cancelled_at: int | None = _time("stopped")
    request_counts: Counts = Field(
        description="Its lines.", examples=[{"total": 3, "completed": 2, "failed": 1}]
    )
    metadata: dict[str, str] | None = Field(description="As it was given.", examples=[{"run": "7"}])


class BatchList(AnswerModel):
    """Batches."""

    object: Literal["list"] = Field(default="list", description="Its kind.", examples=["list"])
    data: list[BatchAnswer] = Field(description="The page, the last one made first.")
    first_id: str | None = Field(
        description="The page's first.", examples=["batch-0123456789abcdef0123456789abcdef"]
    )
    last_id: str | None = Field(
        description="The page's last, which `after` takes.",
        examples=["batch-0123456789abcdef0123456789abcdef"],
    )
    has_more: bool = Field(description="Whether there is another page.", examples=[False])


@router.post("")
async def create_batch(
    body: BatchRequest, services: ServicesDep, caller: GenerateCaller
) -> BatchAnswer:
    """Answer every request of a file, below what people wait for."""
    batches = services.batches
    batch = batches.create(caller, body.input_file_id, body.endpoint, body.metadata)
    return _answer(batches, batch)


@router.get("")
async def list_batches(
    services: ServicesDep,
    caller: GenerateCaller,
    after: Annotated[str | None, Query(description="The last batch of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> BatchList:
    """The tenant's batches, the last one first."""
    batches = services.batches
    found = batches.store.batches(caller.tenant)
    if after is not None:
        last = batches.store.batch(caller.tenant, after)
        found = found[found.index(last) + 1 :]
    page = [_answer(batches, batch) for batch in found[:limit]]
    return BatchList(
        data=page,
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
        has_more=len(found) > limit,
    )


@router.get("/{batch_id}")
async def get_batch(batch_id: str, services: ServicesDep, caller: GenerateCaller) -> BatchAnswer:
    """One of them."""
    batches = services.batches
    return _answer(batches, batches.store.batch(caller.tenant, batch_id))


@router.post("/{batch_id}/cancel")
async def cancel_batch(batch_id: str, services: ServicesDep, caller: GenerateCaller) -> BatchAnswer:
    """End a batch; what is done of it is kept."""
    batches = services.batches
    return _answer(batches, batches.cancel(caller.tenant, batch_id))


def _answer(batches: BatchRunner, batch: BatchRecord) -> BatchAnswer:
    times: dict[str, int | None] = {
        f"{status}_at": batch.times.get(status)
        for status in Status
        if status is not Status.VALIDATING
    }
    failure = batch.failure
    return BatchAnswer(
        id=batch.id,
        endpoint=batch.endpoint,
        errors=None if failure is None else BatchErrors(data=[BatchError(message=failure)]),
        input_file_id=batch.input_id,
        status=batch.status,
        output_file_id=batch.output_id if batch.has_output else None,
        error_file_id=batch.error_id if batch.has_errors else None,
        created_at=batch.created_at,
        expires_at=batch.expires_at,
        request_counts=batches.counts(batch),
        metadata=batch.metadata,
        **times,  # type: ignore[arg-type]
    )
