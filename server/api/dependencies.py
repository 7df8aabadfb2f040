"""What the routes need from the application."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, cast

from fastapi import Depends, Path, Request, Security
from fastapi.security import HTTPBearer

from prefix_store.task_id import MAX_TASK_ID_CHARS, TASK_ID_PATTERN, check_task_id, stored_name
from server.callers import Caller, Scope
from server.errors import ForbiddenError
from server.services import Services

# `Authentication` has looked at the header already; this tells of it in /openapi.json.
_bearer = HTTPBearer(scheme_name="api_key", auto_error=False)


# Coroutines, since the framework calls a plain function on another thread.
async def _services(request: Request) -> Services:
    return cast("Services", request.app.state.services)


async def _caller(request: Request, _: Annotated[object, Security(_bearer)]) -> Caller:
    return cast("Caller", request.state.caller)


ServicesDep = Annotated[Services, Depends(_services)]
AnyCaller = Annotated[Caller, Depends(_caller)]


def _with(scope: Scope) -> Callable[[Caller], Awaitable[Caller]]:
    async def check(caller: AnyCaller) -> Caller:
        if not caller.may(scope):
            raise ForbiddenError(
                f"this needs a key with the scope {scope}; the key {caller.key_id} of the tenant "
                f"{caller.tenant!r} has {', '.join(sorted(caller.scopes)) or 'none'}"
            )
        return caller

    return check


GenerateCaller = Annotated[Caller, Depends(_with(Scope.GENERATE))]
AdminCaller = Annotated[Caller, Depends(_with(Scope.ADMIN))]
MetricsCaller = Annotated[Caller, Depends(_with(Scope.METRICS))]


async def _own_task_id(
    task_id: Annotated[
        str,
        Path(
            description=f"The task's name: 1 to {MAX_TASK_ID_CHARS} letters, digits, '.', '_' or "
            "'-', beginning with a letter or digit.",
            examples=["e2e"],
            # Told, and not checked here: the check's own words are better.
            json_schema_extra={"pattern": f"^{TASK_ID_PATTERN}$"},
        ),
    ],
    caller: AdminCaller,
) -> str:
    return stored_name(caller.tenant, check_task_id(task_id))


OwnTaskId = Annotated[str, Depends(_own_task_id)]
"""What the store calls the task of the path, which is the caller's own if it exists."""
