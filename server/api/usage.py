"""What tenants used, as JSON or CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, fields
from datetime import date, timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field

from server.accounting.usage import today
from server.accounting.usage_store import KEPT_DAYS
from server.accounting.usage_types import UsageRow
from server.api.dependencies import AdminCaller, ServicesDep
from server.api.schemas import AnswerModel
from server.errors import ForbiddenError, InvalidRequestError

_CSV = "text/csv"
_DEFAULT_DAYS = 30
Day = Annotated[date, Field(ge=date(2000, 1, 1), le=date(2999, 12, 31))]

router = APIRouter(prefix="/admin", tags=["Usage"])


class UsageAnswer(AnswerModel):
    """What a tenant used of a task on a day."""

    day: date = Field(description="In UTC.", examples=["2026-03-31"])
    tenant: str = Field(description="Who used it.", examples=["acme"])
    task_id: str | None = Field(
        description="The task, by its tenant's name for it; null is the bare base model.",
        examples=["e2e"],
    )
    sequences: int = Field(
        description="Texts begun; each input of a request is one.", examples=[12]
    )
    prompt_tokens: int = Field(description="Tokens of their prompts.", examples=[528])
    prefix_tokens: int = Field(description="Positions of their prefixes.", examples=[192])
    generated_tokens: int = Field(description="Tokens generated.", examples=[360])


@router.get(
    "/usage",
    response_model=list[UsageAnswer],
    responses={200: {"content": {_CSV: {"schema": {"type": "string"}}}}},
)
async def usage(  # noqa: PLR0917 - the query gives them by name
    request: Request,
    caller: AdminCaller,
    services: ServicesDep,
    tenant: Annotated[
        str | None, Query(description="Of this one only; others than the operator see their own.")
    ] = None,
    task: Annotated[str | None, Query(description="Of this task only.")] = None,
    first: Annotated[
        Day | None, Query(alias="from", description="First day, in UTC; default 30 days ago.")
    ] = None,
    last: Annotated[
        Day | None, Query(alias="to", description="Last day, in UTC; default today.")
    ] = None,
    format_: Annotated[
        Literal["json", "csv"] | None,
        Query(alias="format", description="Default: what the Accept header asks for, else JSON."),
    ] = None,
) -> Any:
    """Tokens by day, tenant and task. Other servers' last second may be missing."""
    if tenant not in (None, caller.tenant) and not caller.is_operator:
        raise ForbiddenError(
            f"the key {caller.key_id} is of the tenant {caller.tenant!r}, and sees its usage only"
        )
    last = last or max(today(), first or date.min)
    first = first or last - timedelta(days=_DEFAULT_DAYS)
    if not 0 <= (last - first).days < KEPT_DAYS:
        raise InvalidRequestError(
            f"from {first} to {last} are {(last - first).days + 1} days; expected 1 to {KEPT_DAYS}"
        )
    seen = tenant if caller.is_operator else caller.tenant
    rows = await services.accounting.ledger.report(first, last, tenant=seen, task_id=task)
    accepts_csv = _CSV in request.headers.get("accept", "")
    if format_ == "csv" or (format_ is None and accepts_csv):
        return Response(_csv(rows), media_type=_CSV)
    return [UsageAnswer(**asdict(row)) for row in rows]


def _csv(rows: Sequence[UsageRow]) -> str:
    """With a heading; the bare base model's task is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(UsageRow)])
    writer.writeheader()
    writer.writerows(map(asdict, rows))
    return text.getvalue()
