"""What the routes need from the application."""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import Depends, Request

from server.services import Services


def _services(request: Request) -> Services:
    return cast("Services", request.app.state.services)


ServicesDep = Annotated[Services, Depends(_services)]
