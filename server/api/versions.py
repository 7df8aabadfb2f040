"""The versions of a task: list, activate, roll back, split among them, delete; and its sharing."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Path, Response
from pydantic import StrictInt

from prefix_store.task import Task
from server.api.admin import task_answer
from server.api.conditions import ConditionDep, etag
from server.api.dependencies import OwnTaskId, ServicesDep
from server.api.description import errors
from server.api.schemas import (
    VERSION_EXAMPLE,
    Activation,
    Sharing,
    TaskResponse,
    VersionResponse,
)

_MOST_SHARES = 100

router = APIRouter(
    prefix="/admin/tasks/{task_id}",
    tags=["Versions"],
    responses=errors(409, 412),
)

VersionName = Annotated[str, Path(description="The version's name.", examples=[VERSION_EXAMPLE])]
Shares = Annotated[
    dict[str, StrictInt],
    Body(
        max_length=_MOST_SHARES,
        description="Percent by version, adding to 100; `{}` ends the split.",
        examples=[{VERSION_EXAMPLE: 100}],
    ),
]


@router.get("/versions")
async def list_versions(
    task_id: OwnTaskId, response: Response, services: ServicesDep
) -> list[VersionResponse]:
    """The versions that the task keeps, the last uploaded first."""
    task = await services.tasks.get(task_id)
    response.headers["ETag"] = etag(task.version)
    shares = {share.version: share.percent for share in task.split} or {task.version: 100}
    return [
        VersionResponse(
            version=record.version,
            active=record.version == task.version,
            percent=shares.get(record.version, 0),
            prefix_length=record.prefix_length,
            bytes=record.nbytes,
            method=record.method,
            base_model=record.base_model,
            created_at=record.created_at,
        )
        for record in task.versions
    ]


@router.post("/activate")
async def activate(
    task_id: OwnTaskId,
    body: Activation,
    response: Response,
    services: ServicesDep,
    condition: ConditionDep,
) -> TaskResponse:
    """Make a kept version the one that requests get from now on; ends a split."""
    return _answer(await services.tasks.activate(task_id, body.version, condition), response)


@router.post("/rollback")
async def rollback(
    task_id: OwnTaskId, response: Response, services: ServicesDep, condition: ConditionDep
) -> TaskResponse:
    """Activate again what was active before; again goes back further. Ends a split."""
    return _answer(await services.tasks.rollback(task_id, condition), response)


@router.post("/split")
async def split(
    task_id: OwnTaskId,
    shares: Shares,
    response: Response,
    services: ServicesDep,
    condition: ConditionDep,
) -> TaskResponse:
    """Divide the requests among kept versions; requests with the same `user` get the same one.

    To raise a new version's share step by step, keep the order of the versions: users who have it
    then keep it.
    """
    return _answer(await services.tasks.split(task_id, shares, condition), response)


@router.post("/pin")
async def pin(
    task_id: OwnTaskId, response: Response, services: ServicesDep, condition: ConditionDep
) -> TaskResponse:
    """Have every server keep the task's prefix loaded, so that no request waits for it.

    409 when it does not fit beside what is pinned already.
    """
    return _answer(await services.tasks.pin(task_id, condition), response)


@router.delete("/pin")
async def unpin(
    task_id: OwnTaskId, response: Response, services: ServicesDep, condition: ConditionDep
) -> TaskResponse:
    """Treat the task's prefix like any other: it stays loaded while it is used often enough."""
    return _answer(await services.tasks.unpin(task_id, condition), response)


@router.put("/sharing")
async def share(
    task_id: OwnTaskId,
    body: Sharing,
    response: Response,
    services: ServicesDep,
    condition: ConditionDep,
) -> TaskResponse:
    """Let these tenants generate with the task, as `<your tenant>/<task>`, and no others.

    They can neither change it nor download its prefix.
    """
    return _answer(await services.tasks.share(task_id, body.tenants, condition), response)


@router.delete("/versions/{version}", status_code=204)
async def delete_version(
    task_id: OwnTaskId, version: VersionName, services: ServicesDep, condition: ConditionDep
) -> None:
    """Forget a version that is neither active nor in a split. Requests that run with it finish."""
    await services.tasks.delete_version(task_id, version, condition)


def _answer(task: Task, response: Response) -> TaskResponse:
    response.headers["ETag"] = etag(task.version)
    return task_answer(task.record, task)
