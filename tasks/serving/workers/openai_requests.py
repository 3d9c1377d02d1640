"""Requests and error bodies of OpenAI's chat completions, as far as they are supported."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

_MOST_STOPS, _MOST_STOP_CHARS = 4, 200


class ApiError(Exception):
    """An answer with another status than 200, in OpenAI's form."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Supported(BaseModel):
    """An unknown field is accepted only if it asks for nothing: null, 0, false, empty."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="after")
    def _asks_for_nothing_else(self) -> Self:
        unknown = sorted(name for name, value in (self.model_extra or {}).items() if value)
        if unknown:
            raise ValueError(f"not supported here: {', '.join(unknown)}")
        return self


class TextPart(_Supported):
    type: Literal["text"]
    text: str


class ChatMessage(_Supported):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Supported):
    include_usage: bool = False


class PlainText(_Supported):
    type: Literal["text"]


Stop = Annotated[str, Field(min_length=1, max_length=_MOST_STOP_CHARS)]


class ChatRequest(_Supported):
    """temperature: greedy if left out, as versions are evaluated (OpenAI's own default is 1)."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=_MOST_STOPS)] | None = None
    n: Literal[1] | None = None
    user: str | None = None  # neither used nor kept
    response_format: PlainText | None = None

    @property
    def conversation(self) -> list[dict[str, str]]:
        return [message.plain() for message in self.messages]

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


def read_request(body: bytes) -> ChatRequest:
    """The request in a body. Raises ApiError with everything that is wrong with it."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        problems = "; ".join(f"{'.'.join(map(str, one['loc'])) or 'body'}: {one['msg']}" for one in found)
        param = str(found[0]["loc"][0]) if found[0]["loc"] else None
        raise ApiError(400, "invalid_request", problems, param) from None
