"""Generate text, whole or token by token."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from pydantic import TypeAdapter
from starlette.responses import Response

from server.api import answering
from server.api.dependencies import AnyCaller, GenerateCaller, ServicesDep
from server.api.description import events
from server.api.parameters import MAX_BEST_OF, MAX_STOP_STRINGS
from server.api.schemas import (
    E2E_EXAMPLE,
    MAX_INPUTS,
    GenerateRequest,
    GenerateResponse,
    InfoResponse,
    InputToken,
    StreamEvent,
)
from server.errors import InvalidRequestError
from server.services import VERSION

router = APIRouter(tags=["Generate"], route_class=answering.CountedRoute)

_ANSWERS = TypeAdapter(list[GenerateResponse])
_EXAMPLES: dict[str, Any] = {
    "a task": {"value": {"task_id": "e2e", "inputs": E2E_EXAMPLE}},
    "the bare base model": {"value": {"inputs": "The capital of France is"}},
    "sampling": {
        "value": {
            "task_id": "e2e",
            "inputs": E2E_EXAMPLE,
            "parameters": {"temperature": 0.7, "seed": 42, "details": True},
        }
    },
    "several inputs": {"value": {"task_id": "e2e", "inputs": [E2E_EXAMPLE, "name : Cotto"]}},
}
GenerateBody = Annotated[GenerateRequest, Body(openapi_examples=_EXAMPLES)]


@router.post(
    "/generate",
    response_model=GenerateResponse | list[GenerateResponse],
    responses=events(StreamEvent),
)
async def generate(
    body: GenerateBody, request: Request, services: ServicesDep, caller: GenerateCaller
) -> Response:
    """Continue one text, or each of a list.

    With `"stream": true` it answers as `POST /generate_stream` does.
    """
    if body.stream:
        return await answering.stream(services, caller, body)
    answers = await answering.while_connected(request, answering.answer(services, caller, body))
    if isinstance(body.inputs, str):
        return _json(answers[0].model_dump_json(exclude_unset=True))
    return _json(_ANSWERS.dump_json(answers, exclude_unset=True))


@router.post(
    "/generate_stream",
    response_model=StreamEvent,
    response_class=answering.EventStream,
    status_code=200,
    responses=events(StreamEvent),
)
async def generate_stream(
    body: GenerateBody, services: ServicesDep, caller: GenerateCaller
) -> Response:
    """Continue one text, token by token, as server-sent events.

    Each event is a line `data:{...}` and an empty line. The texts of the tokens that are not
    special add up to `generated_text`. When generating fails midway, the last event is
    `{"error": ..., "error_type": ...}`. Closing the connection stops the generation.
    """
    return await answering.stream(services, caller, body)


@router.post("/", response_model=list[GenerateResponse], responses=events(StreamEvent))
async def generate_compatible(
    body: GenerateBody, request: Request, services: ServicesDep, caller: GenerateCaller
) -> Response:
    """What text-generation-inference's clients call: always a list, or events to stream."""
    if body.stream:
        return await answering.stream(services, caller, body)
    answers = await answering.while_connected(request, answering.answer(services, caller, body))
    return _json(_ANSWERS.dump_json(answers, exclude_unset=True))


@router.post("/tokenize")
async def tokenize(
    body: GenerateBody, services: ServicesDep, caller: GenerateCaller
) -> list[InputToken]:
    """A text's tokens, as the bare base model reads it; nothing is generated.

    Of the body only `inputs` counts, one text.
    """
    if not isinstance(body.inputs, str):
        raise InvalidRequestError(f"inputs is a list of {len(body.inputs)}; expected one text")
    tokens = await services.tokenizer.tokens(body.inputs)
    return [InputToken(id=i, text=body.inputs[a:b], start=a, stop=b) for i, a, b in tokens]


@router.get("/info")
async def info(services: ServicesDep, _: AnyCaller) -> InfoResponse:
    """What this server runs and how much it takes."""
    spec, settings = services.engine.spec, services.settings
    return InfoResponse(
        model_id=spec.name,
        model_sha=spec.fingerprint,
        model_dtype=services.dtype,
        model_device_type=services.device,
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        max_total_tokens=services.engine.max_length,
        max_concurrent_requests=settings.max_slots + settings.max_waiting,
        max_client_batch_size=MAX_INPUTS,
        max_stop_sequences=MAX_STOP_STRINGS,
        max_best_of=MAX_BEST_OF,
        version=VERSION,
    )


def _json(data: str | bytes) -> Response:
    return Response(data, media_type="application/json")
