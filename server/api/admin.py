"""Upload, list, download and delete tasks."""

from __future__ import annotations

from mmap import ACCESS_COPY, mmap
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile

from prefix_store.condition import Condition
from prefix_store.errors import PrefixTooLargeError
from prefix_store.task import Task, TaskRecord
from prefix_store.task_id import TASK_ID_PATTERN, check_task_id, stored_name
from prefix_store.tensor_file import Buffer
from server.api import downloads
from server.api.conditions import ConditionDep, etag
from server.api.dependencies import AdminCaller, OwnTaskId, ServicesDep
from server.api.description import errors
from server.api.schemas import TaskCount, TaskResponse, TextUpload
from server.errors import InvalidRequestError
from server.services import Services

_MOST_FILES = 2  # a PEFT adapter's
_FIELD = "file"
_JSON = "application/json"
_MULTIPART = "multipart/form-data"

MOST_LISTED = 1000

router = APIRouter(prefix="/admin/tasks", tags=["Tasks"])
counts = APIRouter(prefix="/admin", tags=["Tasks"])

Limit = Annotated[int, Query(ge=1, le=MOST_LISTED, description="At most so many.")]
After = Annotated[
    str | None,
    Query(
        description="Only names that come after this one.",
        json_schema_extra={"pattern": f"^{TASK_ID_PATTERN}$"},
    ),
]

Activate = Annotated[
    bool,
    Query(description="false keeps the new version without using it yet; the task must exist."),
]
Version = Annotated[str | None, Query(description="Another than the active version.")]
_UPLOAD_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        _MULTIPART: {
            "schema": {
                "type": "object",
                "required": [_FIELD],
                "properties": {
                    _FIELD: {
                        "type": "array",
                        "minItems": 1,
                        "maxItems": _MOST_FILES,
                        "items": {"type": "string", "format": "binary"},
                        "description": "One prefix artefact (safetensors); or the two files of a "
                        "PEFT adapter of type PREFIX_TUNING, CARTRIDGE, PROMPT_TUNING or P_TUNING, "
                        "adapter_config.json and adapter_model.safetensors, in any order; or the "
                        "prefix encoder of P-tuning v2 (safetensors).",
                    }
                },
            }
        },
        _JSON: {"schema": TextUpload.model_json_schema()},
    },
}


@router.put(
    "/{task_id}",
    status_code=201,
    openapi_extra={"requestBody": _UPLOAD_BODY},
    responses=errors(409, 412),
)
async def upload(
    task_id: OwnTaskId,
    request: Request,
    response: Response,
    services: ServicesDep,
    *,
    condition: ConditionDep,
    activate: Activate = True,
) -> TaskResponse:
    """Give a task its prefix: a new one, or another from now on.

    Requests that run finish with the prefix they started with. On an error nothing is stored.
    """
    record = await _stored(task_id, request, services, condition, activate)
    response.headers["ETag"] = etag(record.version)
    return task_answer(record)


async def _stored(
    task_id: str, request: Request, services: Services, condition: Condition, activate: bool
) -> TaskRecord:
    match request.headers.get("content-type", "").partition(";")[0].strip().lower():
        case "multipart/form-data":
            async with request.form(max_files=_MOST_FILES, max_fields=_MOST_FILES) as form:
                files = await _files(form, services.settings.max_upload_bytes)
                return await services.tasks.upload(
                    task_id, files, activate=activate, condition=condition
                )
        case "application/json":
            text = _text(await request.body())
            return await services.tasks.upload_text(
                task_id, text, activate=activate, condition=condition
            )
        case other:
            raise HTTPException(
                415, f"Content-Type is {other[:80]!r}; expected {_MULTIPART} or {_JSON}"
            )


@router.get("")
async def list_tasks(
    services: ServicesDep, caller: AdminCaller, limit: Limit = MOST_LISTED, after: After = None
) -> list[TaskResponse]:
    """The tenant's tasks by name, a page at a time: go on after the last one's name."""
    start = "" if after is None else stored_name(caller.tenant, check_task_id(after))
    tasks = await services.tasks.page(caller.tenant, limit, start)
    return [task_answer(task.record, task) for task in tasks]


@counts.get("/task-count")
async def count_tasks(services: ServicesDep, caller: AdminCaller) -> TaskCount:
    """How many tasks the tenant has."""
    return TaskCount(tasks=await services.tasks.count(caller.tenant))


@router.get("/{task_id}")
async def get_task(task_id: OwnTaskId, response: Response, services: ServicesDep) -> TaskResponse:
    """One task; the ETag is its active version."""
    task = await services.tasks.get(task_id)
    response.headers["ETag"] = etag(task.version)
    return task_answer(task.record, task)


@router.get(
    "/{task_id}/prefix",
    response_class=Response,
    responses={
        200: {
            "description": "The artefact, byte for byte as it is stored.",
            "content": {
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}}
            },
        },
        206: {"description": "The part of it that a Range header asks for."},
        304: {"description": "If-None-Match names the version: the client has it."},
        416: {"description": "No byte of the asked range exists."},
    },
)
async def download(
    task_id: OwnTaskId, request: Request, services: ServicesDep, version: Version = None
) -> Response:
    """The task's prefix as one safetensors file, as it comes from the store."""
    task = await services.tasks.get(task_id)
    return await downloads.download(services, request, task.at(version or task.version))


@router.delete("/{task_id}", status_code=204, responses=errors(412))
async def delete(task_id: OwnTaskId, services: ServicesDep, condition: ConditionDep) -> None:
    """Forget a task and its prefixes. Requests that run with them finish."""
    await services.tasks.delete(task_id, condition)


async def _files(form: FormData, max_bytes: int) -> list[tuple[str, Buffer]]:
    """Names and contents of the uploaded files; large ones lie on disk."""
    files = [part for name, part in form.multi_items() if name == _FIELD]
    uploads = [part for part in files if isinstance(part, UploadFile)]
    if not uploads or len(uploads) != len(form.multi_items()):
        names = sorted({name[:40] for name in form}) or "none"
        raise InvalidRequestError(
            f"the form has the fields {names}; expected files in the field {_FIELD!r}, once or "
            "twice, and nothing else"
        )
    size = sum(part.size or 0 for part in uploads)
    if size > max_bytes:
        raise PrefixTooLargeError(
            f"the upload has {size} bytes, over this server's limit of {max_bytes}; its operator "
            "can raise --max-upload-bytes"
        )
    return [(part.filename or "", _contents(part)) for part in uploads]


def _contents(part: UploadFile) -> Buffer:
    """What was uploaded, as a file's memory: it is never read as a whole."""
    if not part.size:
        return b""
    part.file.flush()
    return mmap(part.file.fileno(), 0, access=ACCESS_COPY)


def _text(body: bytes) -> str:
    try:
        return TextUpload.model_validate_json(body).text
    except ValidationError as error:
        raise RequestValidationError(error.errors(), body={}) from error


def task_answer(record: TaskRecord, task: Task | None = None) -> TaskResponse:
    """A task at one version, with its split if it has one."""
    return TaskResponse(
        task_id=record.name,
        version=record.version,
        prefix_length=record.prefix_length,
        bytes=record.nbytes,
        method=record.method,
        base_model=record.base_model,
        template=record.template,
        created_at=record.created_at,
        split={} if task is None else {share.version: share.percent for share in task.split},
        pinned=task is not None and task.pinned,
        shared_with=[] if task is None else list(task.shared_with),
    )
