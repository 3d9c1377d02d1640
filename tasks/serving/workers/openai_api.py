"""The part of OpenAI's HTTP interface that chat clients use, over the voices of this process, with its limits.

POST /v1/chat/completions   one answer, whole or streamed
GET  /v1/models             the names that `model` may have
GET  /version               which version answers, and since when
GET  /health                200 as long as somebody answers; the only one that needs no key
"""

import hmac
import json
import os
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi.sse import EventSourceResponse, format_sse_event
from jinja2.exceptions import TemplateError
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from tasks.serving.workers.generation import Answer, Wish
from tasks.serving.workers.loaded_model import BASE, Voice
from tasks.serving.workers.model_pool import Voices
from tasks.serving.workers.openai_requests import ApiError, ChatRequest, read_request

KEY_VARIABLE = "TUNEGATE_API_KEY"
_MOST_BODY_BYTES = 2**20
_LOOPBACK_NAMES = ["127.0.0.1", "localhost", "[::1]"]


@dataclass(frozen=True)
class Limits:
    """prompt_tokens, answer_tokens: the longest. requests: at work or waiting at the same time."""

    prompt_tokens: int
    answer_tokens: int
    requests: int


Heard = Callable[[ChatRequest, Answer, str], None]
"""Told of each answer that was given to its end."""


def build_app(voices: Voices, limits: Limits, on_loopback: bool, heard: Heard) -> FastAPI:
    """on_loopback: requests must name this machine as their host, so that no page in a browser is led here by DNS."""
    app = FastAPI(title="Tunegate", docs_url=None, redoc_url=None, openapi_url=None)
    if on_loopback:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=_LOOPBACK_NAMES)
    app.add_exception_handler(ApiError, _tell_error)
    app.add_exception_handler(HTTPException, _tell_status)
    app.add_exception_handler(500, _tell_failure)
    closed = [Depends(_check_key)]

    @app.get("/health")
    async def health() -> dict[str, Any]:
        state = "degraded" if voices.failure else "ok"
        return {"status": state, "model": voices.served.label, "failure": voices.failure}

    @app.get("/version", dependencies=closed)
    async def version() -> dict[str, Any]:
        return {"served": _about(voices.served), "shadow": _about(voices.shadow) if voices.shadow else None}

    @app.get("/v1/models", dependencies=closed)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(name, voice) for name, voice in _names(voices).items()]}

    @app.post("/v1/chat/completions", dependencies=closed)
    async def complete(request: Request) -> Response:
        asked = read_request(await _body(request))
        voice = _voice(voices, asked.model)
        wish = _wish(voice, asked, limits)
        if voices.waiting >= limits.requests:
            raise ApiError(429, "rate_limit_exceeded", f"{limits.requests} requests are being answered: try again")
        answer = voices.write(voice, wish)
        if asked.stream:
            return EventSourceResponse(_stream(answer, asked, heard))
        return JSONResponse(await _whole(request, answer, asked, heard))

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


def _names(voices: Voices) -> dict[str, Voice]:
    """Every name that `model` may have. A version's number stops being one when the alias has moved on."""
    served = voices.served
    alias = served.told["alias"]
    names = {f"{served.told['name']}@{alias}": served} if alias else {}
    names[served.label] = served
    return names | ({BASE: served.base} if served.base else {})


def _voice(voices: Voices, model: str) -> Voice:
    names = _names(voices)
    if model not in names:
        raise ApiError(404, "model_not_found", f"{model!r} is not served here; served: {', '.join(names)}", "model")
    return names[model]


def _wish(voice: Voice, asked: ChatRequest, limits: Limits) -> Wish:
    try:
        prompt = voice.prompt(asked.conversation)
    except TemplateError as error:
        raise ApiError(400, "invalid_messages", f"the model's chat template: {error}", "messages") from error
    room = getattr(voice.model.config, "max_position_embeddings", None) or limits.prompt_tokens + limits.answer_tokens
    longest = min(limits.prompt_tokens, room - 1)
    if len(prompt) > longest:
        told = f"the prompt has {len(prompt):,} tokens; at most {longest:,} are taken"
        raise ApiError(400, "context_length_exceeded", told, "messages")
    most = min(limits.answer_tokens, room - len(prompt))
    wanted = asked.max_completion_tokens or asked.max_tokens or most
    if wanted > most:
        told = f"max_tokens is {wanted:,}; at most {most:,} are written after this prompt"
        raise ApiError(400, "max_tokens_too_large", told, "max_tokens")
    return Wish(prompt, wanted, asked.temperature or 0.0, asked.top_p, asked.seed, asked.stops)


# --- answers ------------------------------------------------------------------------------------------------


async def _whole(request: Request, answer: Answer, asked: ChatRequest, heard: Heard) -> dict[str, Any]:
    text = ""
    async for piece in answer.pieces():
        text += piece
        if await request.is_disconnected():
            answer.cancel()
    if not answer.was_cut:
        heard(asked, answer, text)
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": _finish(answer), "logprobs": None}
    told = _head(answer) | {"object": "chat.completion", "choices": [choice], "usage": _usage(answer)}
    return ChatCompletion.model_validate(told).model_dump(exclude_unset=True)


async def _stream(answer: Answer, asked: ChatRequest, heard: Heard) -> AsyncIterator[bytes]:
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
    heard(asked, answer, text)
    yield event({}, _finish(answer))
    if asked.stream_options and asked.stream_options.include_usage:
        yield _event(head | {"choices": [], "usage": _usage(answer)})
    yield format_sse_event(data_str="[DONE]")


def _event(chunk: dict[str, Any]) -> bytes:
    return format_sse_event(data_str=ChatCompletionChunk.model_validate(chunk).model_dump_json(exclude_unset=True))


def _head(answer: Answer) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": answer.voice.label}


def _finish(answer: Answer) -> str:
    return "stop" if answer.is_whole else "length"


def _usage(answer: Answer) -> dict[str, int]:
    prompt = len(answer.wish.prompt)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer.tokens,
        "total_tokens": prompt + answer.tokens,
    }


# --- who answers, and errors --------------------------------------------------------------------------------


def _about(voice: Voice) -> dict[str, Any]:
    meta, told = voice.meta, voice.told
    return {
        "name": told["name"], "version": told["version"], "alias": told["alias"],
        "adapter_sha256": told["adapter_sha256"], "base": meta["base"], "base_digest": meta["base_digest"],
        "method": meta["method"], "quantisation": meta["quantisation"], "since_unix_seconds": voice.since_unix_seconds,
    }  # fmt: skip


def _model(name: str, voice: Voice) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(voice.since_unix_seconds), "owned_by": "tunegate"}


async def _tell_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, status_code=error.status)


async def _tell_status(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = ApiError(error.status_code, "http_error", f"{request.method} {request.url.path}: {error.detail}")
    return JSONResponse(told.body, status_code=error.status_code)


async def _tell_failure(request: Request, error: Exception) -> Response:
    """starlette writes the traceback to the worker's log; a client learns the kind of error only."""
    return JSONResponse(ApiError(500, "failed", _failure(error)).body, status_code=500)


def _failure(error: Exception) -> str:
    return f"the answer could not be written ({type(error).__name__}); the server's log says more"
