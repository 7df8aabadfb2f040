"""vLLM's calls to load and unload adapters, as scripts make them.

https://docs.vllm.ai/en/latest/features/lora.html
"""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import PlainTextResponse

from prefix_store.condition import ALWAYS, ANY, Condition
from prefix_store.errors import PreconditionFailedError
from prefix_store.task_id import check_task_id, stored_name
from server.adapter_folder import read_adapter
from server.api.dependencies import AdminCaller, ServicesDep
from server.api.parameters import RequestModel
from server.errors import ForbiddenError, InvalidRequestError
from server.request_context import current_request

router = APIRouter(prefix="/v1", tags=["vLLM's adapters"])


class LoadAdapter(RequestModel):
    """An adapter to make a task of."""

    lora_name: str = Field(max_length=512, description="The task's name.", examples=["reviews"])
    lora_path: str = Field(
        max_length=4096,
        description="A folder below `--adapter-dir`: a PEFT adapter's, or one with one artefact.",
        examples=["reviews-prefix"],
    )
    load_inplace: bool = Field(
        default=False, description="Replace a task that is there.", examples=[False]
    )


class UnloadAdapter(RequestModel):
    """A task to delete."""

    lora_name: str = Field(max_length=512, description="The task's name.", examples=["reviews"])
    lora_int_id: int | None = Field(default=None, description="Not used.", examples=[None])


@router.post("/load_lora_adapter", response_class=PlainTextResponse)
async def load_lora_adapter(
    body: LoadAdapter, services: ServicesDep, caller: AdminCaller
) -> PlainTextResponse:
    """Upload the adapter in a folder of the server's machine as a task; for its operator."""
    current_request().target["task_id"] = body.lora_name
    if not caller.is_operator:
        raise ForbiddenError("the adapters on this machine are for the server's operator to load")
    name, folder = body.lora_name, services.settings.adapter_dir
    if not name or not body.lora_path:
        raise InvalidRequestError("Both 'lora_name' and 'lora_path' must be provided.")
    if name == services.engine.spec.name:
        raise InvalidRequestError(f"The lora adapter name '{name}' conflicts with the base model.")
    assert folder is not None  # noqa: S101 - else there is no such route
    limit = services.settings.max_upload_bytes
    files = await asyncio.to_thread(read_adapter, folder, body.lora_path, limit)
    condition = ALWAYS if body.load_inplace else Condition(none_match=frozenset((ANY,)))
    try:
        await services.tasks.upload(check_task_id(name), files, condition=condition)
    except PreconditionFailedError as error:
        raise InvalidRequestError(
            f"The lora adapter '{name}' has already been loaded. If you want to load the adapter "
            "in place, set 'load_inplace' to True."
        ) from error
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@router.post("/unload_lora_adapter", response_class=PlainTextResponse)
async def unload_lora_adapter(
    body: UnloadAdapter, services: ServicesDep, caller: AdminCaller
) -> PlainTextResponse:
    """Delete a task, however it was uploaded."""
    current_request().target["task_id"] = body.lora_name
    if not body.lora_name:
        raise InvalidRequestError("'lora_name' needs to be provided to unload a LoRA adapter.")
    await services.tasks.delete(stored_name(caller.tenant, check_task_id(body.lora_name)))
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
