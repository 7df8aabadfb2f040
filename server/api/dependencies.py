"""What the routes need from the application."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, cast

from fastapi import Depends, Request

from server.callers import ANYBODY, Caller, Scope
from server.errors import ForbiddenError
from server.services import Services


# Coroutines, since the framework calls a plain function on another thread.
async def _services(request: Request) -> Services:
    return cast("Services", request.app.state.services)


async def _caller(request: Request) -> Caller:
    request.state.caller = ANYBODY
    return ANYBODY


ServicesDep = Annotated[Services, Depends(_services)]
CallerDep = Annotated[Caller, Depends(_caller)]


def _with(scope: Scope) -> Callable[[Caller], Awaitable[Caller]]:
    async def check(caller: CallerDep) -> Caller:
        if scope not in caller.scopes:
            raise ForbiddenError(
                f"this needs a key with the scope {scope}; key {caller.key_id} has "
                f"{', '.join(sorted(caller.scopes)) or 'none'}"
            )
        return caller

    return check


GenerateCaller = Annotated[Caller, Depends(_with(Scope.GENERATE))]
AdminCaller = Annotated[Caller, Depends(_with(Scope.ADMIN))]
MetricsCaller = Annotated[Caller, Depends(_with(Scope.METRICS))]
