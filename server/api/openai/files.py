"""OpenAI's files, as far as batches need them."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from fastapi import APIRouter, HTTPException, Request
from pydantic import Field
from starlette.datastructures import FormData, UploadFile
from starlette.responses import FileResponse, Response

from server.api.dependencies import GenerateCaller, ServicesDep
from server.api.schemas import AnswerModel
from server.batches.records import FileRecord
from server.errors import InvalidRequestError

router = APIRouter(prefix="/v1/files", tags=["Batches"])

_MOST_NAME_CHARS = 255
_MULTIPART = "multipart/form-data"
_JSON_LINES = "application/jsonl"
_UPLOAD_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        _MULTIPART: {
            "schema": {
                "type": "object",
                "required": ["file", "purpose"],
                "properties": {
                    "file": {
                        "type": "string",
                        "format": "binary",
                        "description": "JSON lines, each with custom_id, method, url and body.",
                    },
                    "purpose": {"type": "string", "enum": ["batch"]},
                },
            }
        }
    },
}


class FileAnswer(AnswerModel):
    """A file."""

    id: str = Field(description="Its name.", examples=["file-0123456789abcdef0123456789abcdef"])
    object: Literal["file"] = Field(default="file", description="Its kind.", examples=["file"])
    bytes: int = Field(description="Its size.", examples=[1234])
    created_at: int = Field(
        description="When it was uploaded, in unix seconds.", examples=[1_764_288_000]
    )
    filename: str = Field(description="What its owner calls it.", examples=["requests.jsonl"])
    purpose: str = Field(description="batch, or batch_output for results.", examples=["batch"])
    status: Literal["processed"] = Field(
        default="processed", description="Always so.", examples=["processed"]
    )


class FileList(AnswerModel):
    """Files."""

    object: Literal["list"] = Field(default="list", description="Its kind.", examples=["list"])
    data: list[FileAnswer] = Field(description="All of the tenant's files.")
    has_more: Literal[False] = Field(
        default=False, description="Always false: they are on one page.", examples=[False]
    )


class DeletedFile(AnswerModel):
    """That a file is deleted."""

    id: str = Field(description="Its name.", examples=["file-0123456789abcdef0123456789abcdef"])
    object: Literal["file"] = Field(default="file", description="Its kind.", examples=["file"])
    deleted: Literal[True] = Field(default=True, description="Always so.", examples=[True])


@router.post("", openapi_extra={"requestBody": _UPLOAD_BODY})
async def upload_file(
    request: Request, services: ServicesDep, caller: GenerateCaller
) -> FileAnswer:
    """Upload a batch's requests."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != _MULTIPART:
        raise HTTPException(415, f"Content-Type is {kind[:80]!r}; expected {_MULTIPART}")
    async with request.form(max_files=1, max_fields=1) as form:
        part = _file_of(form)
        most = services.settings.max_batch_file_bytes
        if (part.size or 0) > most:
            raise HTTPException(
                413,
                f"the file has {part.size} bytes; expected at most {most}, which "
                "--max-batch-file-bytes sets",
            )
        name = (part.filename or "").encode(errors="replace").decode()[:_MOST_NAME_CHARS]
        store = services.batches.store
        record = await asyncio.to_thread(store.add_file, caller.tenant, name, "batch", part.file)
    return _answer(record)


@router.get("")
async def list_files(services: ServicesDep, caller: GenerateCaller) -> FileList:
    """The tenant's files, the last one first."""
    files = services.batches.store.files(caller.tenant)
    return FileList(data=[_answer(file) for file in files])


@router.get("/{file_id}")
async def get_file(file_id: str, services: ServicesDep, caller: GenerateCaller) -> FileAnswer:
    """One of them."""
    return _answer(services.batches.store.file(caller.tenant, file_id))


@router.get(
    "/{file_id}/content",
    response_class=Response,
    responses={
        200: {"description": "The file.", "content": {_JSON_LINES: {"schema": {"type": "string"}}}},
    },
)
async def get_file_content(
    file_id: str, services: ServicesDep, caller: GenerateCaller
) -> FileResponse:
    """What is in it."""
    store = services.batches.store
    record = store.file(caller.tenant, file_id)
    return FileResponse(store.path(record.id), media_type=_JSON_LINES)


@router.delete("/{file_id}")
async def delete_file(file_id: str, services: ServicesDep, caller: GenerateCaller) -> DeletedFile:
    """Delete a file; a batch that has not read all of it fails."""
    services.batches.store.delete_file(caller.tenant, file_id)
    return DeletedFile(id=file_id)


def _file_of(form: FormData) -> UploadFile:
    """The form's file.

    Raises:
        InvalidRequestError: the form is not one file and the purpose.
    """
    part, purpose = form.get("file"), form.get("purpose")
    if len(form.multi_items()) != 2 or not isinstance(part, UploadFile):
        names = sorted({name[:40] for name in form}) or "none"
        raise InvalidRequestError(
            f"the form has the fields {names}; expected a file in 'file', 'purpose', and nothing "
            "else"
        )
    if purpose != "batch":
        shown = purpose[:40] if isinstance(purpose, str) else "a file"
        raise InvalidRequestError(f"purpose is {shown!r}; expected 'batch'")
    return part


def _answer(record: FileRecord) -> FileAnswer:
    return FileAnswer(**record.model_dump(exclude={"tenant"}))
