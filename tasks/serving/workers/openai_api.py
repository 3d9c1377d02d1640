"""The part of OpenAI's HTTP interface that chat clients use, over the models of this process, with its limits.

POST /v1/chat/completions   one answer, whole or streamed
GET  /v1/models             the names that `model` may have
GET  /version               which version answers, and since when
GET  /health                200 as long as a version answers; the only one that needs no key
"""

import hmac
import json
import os
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi.sse import EventSourceResponse, format_sse_event
from jinja2.exceptions import TemplateError
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from data_contracts.jobs.serving import BASE, RequestLimits
from tasks.serving.workers.generation import Answer, GenerationRequest
from tasks.serving.workers.loaded_model import LoadedModel
from tasks.serving.workers.model_pool import ModelPool
from tasks.serving.workers.openai_requests import ApiError, ChatRequest, read_request

KEY_VARIABLE = "TUNEGATE_API_KEY"
_MOST_BODY_BYTES = 2**20
_LOOPBACK_NAMES = ["127.0.0.1", "localhost", "[::1]"]


OnAnswer = Callable[[ChatRequest, Answer, str], None]
"""Called with each answer that was given to its end."""


def build_app(pool: ModelPool, limits: RequestLimits, on_answer: OnAnswer, *, on_loopback: bool) -> FastAPI:
    """The application. on_loopback: requests must name this machine as their host, so that DNS leads no page in a browser here."""
    app = FastAPI(title="Tunegate", docs_url=None, redoc_url=None, openapi_url=None)
    if on_loopback:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=_LOOPBACK_NAMES)
    app.add_exception_handler(ApiError, _error_response)
    app.add_exception_handler(HTTPException, _status_response)
    app.add_exception_handler(500, _failure_response)
    needs_key = [Depends(_check_key)]

    @app.get("/health")
    async def health() -> dict[str, Any]:
        state = "degraded" if pool.failure else "ok"
        return {"status": state, "model": pool.served.label, "failure": pool.failure}

    @app.get("/version", dependencies=needs_key)
    async def version() -> dict[str, Any]:
        return {"served": _describe(pool.served), "shadow": _describe(pool.shadow) if pool.shadow else None}

    @app.get("/v1/models", dependencies=needs_key)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_listing(name, loaded) for name, loaded in _names(pool).items()]}

    @app.post("/v1/chat/completions", dependencies=needs_key)
    async def complete(request: Request) -> Response:
        asked = read_request(await _body(request))
        loaded = _named(pool, asked.model)
        generation = _generation_request(loaded, asked, limits)
        if pool.waiting >= limits.requests:
            raise ApiError(429, "rate_limit_exceeded", f"{limits.requests} requests are being answered: try again")
        answer = pool.start_answer(loaded, generation)
        if asked.stream:
            return EventSourceResponse(_stream(answer, asked, on_answer))
        return JSONResponse(await _whole(request, answer, asked, on_answer))

    return app


# --- requests -----------------------------------------------------------------------------------------------


def _check_key(request: Request) -> None:
    wanted = os.environ.get(KEY_VARIABLE)
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if wanted and not hmac.compare_digest(wanted.encode(), given.encode()):
        raise ApiError(401, "invalid_api_key", f"the key is not the one in the server's {KEY_VARIABLE}")


async def _body(request: Request) -> bytes:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "unsupported_media_type", "send application/json")  # what a page of another site cannot
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MOST_BODY_BYTES:
            raise ApiError(413, "request_too_large", f"a request has at most {_MOST_BODY_BYTES:,} bytes")
    return bytes(body)


def _names(pool: ModelPool) -> dict[str, LoadedModel]:
    """Every name that `model` may have. A version's number stops being one when the alias has moved on."""
    served = pool.served
    alias = served.version.alias
    names = {f"{served.version.name}@{alias}": served} if alias else {}
    names[served.label] = served
    return names | ({BASE: served.base} if served.base else {})


def _named(pool: ModelPool, model: str) -> LoadedModel:
    names = _names(pool)
    if model not in names:
        raise ApiError(404, "model_not_found", f"{model!r} is not served here; served: {', '.join(names)}", "model")
    return names[model]


def _generation_request(loaded: LoadedModel, asked: ChatRequest, limits: RequestLimits) -> GenerationRequest:
    try:
        prompt = loaded.prompt(asked.conversation)
    except TemplateError as error:
        raise ApiError(400, "invalid_messages", f"the model's chat template: {error}", "messages") from error
    room = getattr(loaded.model.config, "max_position_embeddings", None) or limits.prompt_tokens + limits.answer_tokens
    longest = min(limits.prompt_tokens, room - 1)
    if len(prompt) > longest:
        problem = f"the prompt has {len(prompt):,} tokens; at most {longest:,} are taken"
        raise ApiError(400, "context_length_exceeded", problem, "messages")
    most = min(limits.answer_tokens, room - len(prompt))
    wanted = asked.max_completion_tokens or asked.max_tokens or most
    if wanted > most:
        problem = f"max_tokens is {wanted:,}; at most {most:,} are written after this prompt"
        raise ApiError(400, "max_tokens_too_large", problem, "max_tokens")
    return GenerationRequest(prompt, wanted, asked.temperature or 0.0, asked.top_p, asked.seed, asked.stops)


# --- answers ------------------------------------------------------------------------------------------------


async def _whole(request: Request, answer: Answer, asked: ChatRequest, on_answer: OnAnswer) -> dict[str, Any]:
    text = ""
    async for piece in answer.pieces():
        text += piece
        if await request.is_disconnected():
            answer.cancel()
    if not answer.was_cut:
        on_answer(asked, answer, text)
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": _finish(answer), "logprobs": None}
    completion = _head(answer) | {"object": "chat.completion", "choices": [choice], "usage": _usage(answer)}
    return ChatCompletion.model_validate(completion).model_dump(exclude_unset=True)


async def _stream(answer: Answer, asked: ChatRequest, on_answer: OnAnswer) -> AsyncIterator[bytes]:
    head = _head(answer) | {"object": "chat.completion.chunk"}

    def event(delta: dict[str, Any], finish: str | None = None) -> bytes:
        return _event(head | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

    yield event({"role": "assistant", "content": ""})
    text = ""
    try:
        async for piece in answer.pieces():
            text += piece
            if piece:
                yield event({"content": piece})
    except Exception as error:  # noqa: BLE001 the status is sent already: only the stream can report the failure
        traceback.print_exception(error)  # into the worker's log
        yield format_sse_event(data_str=json.dumps(ApiError(500, "failed", _failure(error)).body))
        return
    on_answer(asked, answer, text)
    yield event({}, _finish(answer))
    if asked.stream_options and asked.stream_options.include_usage:
        yield _event(head | {"choices": [], "usage": _usage(answer)})
    yield format_sse_event(data_str="[DONE]")


def _event(chunk: dict[str, Any]) -> bytes:
    return format_sse_event(data_str=ChatCompletionChunk.model_validate(chunk).model_dump_json(exclude_unset=True))


def _head(answer: Answer) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": answer.loaded.label}


def _finish(answer: Answer) -> str:
    return "stop" if answer.is_whole else "length"


def _usage(answer: Answer) -> dict[str, int]:
    prompt = len(answer.request.prompt)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer.tokens,
        "total_tokens": prompt + answer.tokens,
    }


# --- versions, and errors -----------------------------------------------------------------------------------


def _describe(loaded: LoadedModel) -> dict[str, Any]:
    meta, version = loaded.meta, loaded.version
    return {
        "name": version.name, "version": version.version, "alias": version.alias,
        "adapter_sha256": version.adapter_sha256, "base": meta["base"], "base_digest": meta["base_digest"],
        "method": meta["method"], "quantisation": meta["quantisation"], "since_unix_seconds": loaded.since_unix_seconds,
    }  # fmt: skip


def _listing(name: str, loaded: LoadedModel) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(loaded.since_unix_seconds), "owned_by": "tunegate"}


async def _error_response(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, status_code=error.status)


async def _status_response(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    problem = ApiError(error.status_code, "http_error", f"{request.method} {request.url.path}: {error.detail}")
    return JSONResponse(problem.body, status_code=error.status_code)


async def _failure_response(request: Request, error: Exception) -> Response:
    """starlette writes the traceback to the worker's log; a client learns the kind of error only."""
    return JSONResponse(ApiError(500, "failed", _failure(error)).body, status_code=500)


def _failure(error: Exception) -> str:
    return f"the answer could not be written ({type(error).__name__}); the server's log says more"
