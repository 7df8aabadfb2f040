"""OpenAI's API: https://platform.openai.com/docs/api-reference"""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.answering import CountedRoute, while_connected
from server.api.dependencies import GenerateCaller, ServicesDep
from server.api.description import events
from server.api.openai import chat, completions, models
from server.api.openai.answers import ChatCompletion, Completion, ModelAnswer, ModelList
from server.api.openai.requests import ChatRequest, CompletionRequest

router = APIRouter(prefix="/v1", tags=["OpenAI"])
_generating = APIRouter(route_class=CountedRoute)


@_generating.post("/completions", response_model=Completion, responses=events())
async def create_completion(
    body: CompletionRequest, request: Request, services: ServicesDep, caller: GenerateCaller
) -> Response:
    """Continue a text, or several; with `echo` and `logprobs`, score them.

    With `"stream": true` it answers with server-sent events, the last of them `data: [DONE]`.
    """
    if body.stream:
        return await completions.stream(services, caller, body)
    answer = await while_connected(request, completions.complete(services, caller, body))
    return Response(answer.model_dump_json(), media_type="application/json")


@_generating.post("/chat/completions", response_model=ChatCompletion, responses=events())
async def create_chat_completion(
    body: ChatRequest, request: Request, services: ServicesDep, caller: GenerateCaller
) -> Response:
    """Continue a conversation.

    With `"stream": true` it answers with server-sent events, the last of them `data: [DONE]`.
    """
    if body.stream:
        return await chat.stream(services, caller, body)
    answer = await while_connected(request, chat.complete(services, caller, body))
    return Response(answer.model_dump_json(), media_type="application/json")


@router.get("/models")
async def list_models(services: ServicesDep, caller: GenerateCaller) -> ModelList:
    """What can be named as `model`: the base model, and every task."""
    return await models.list_models(services, caller)


@router.get("/models/{model:path}")
async def get_model(model: str, services: ServicesDep, caller: GenerateCaller) -> ModelAnswer:
    """One of them."""
    return await models.get_model(services, caller, model)


router.include_router(_generating)
