"""Chat with a registered version in the terminal, and with its base if asked, over the same server that `serve` starts."""

import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rich.live import Live
from rich.table import Table
from rich.text import Text

from data_contracts.errors import ConfigError, Problem
from data_contracts.jobs.serving import BASE, RequestLimits, ServeJob
from data_contracts.run_spec import StoreSpec
from tasks.runtime.console import note, page
from tasks.serving.endpoint import Endpoint, RegistryFollower, parse_model_name

if TYPE_CHECKING:
    from openai import OpenAI

_RESET, _QUIT = "/reset", "/quit"
_PROMPT_TOKENS = 8192
_LOOPBACK = "127.0.0.1"


@dataclass
class ChatTurn:
    """A question and what each model answered; error: why it could not be asked."""

    question: str
    answers: dict[str, str] = field(default_factory=dict)
    error: str | None = None

    def payload(self) -> dict[str, Any]:
        return asdict(self)


Show = Callable[[dict[str, str]], None]


@dataclass
class ChatSession:
    """One conversation with each model: each continues from its own answers."""

    client: "OpenAI"
    models: list[str]
    most_tokens: int
    messages: dict[str, list[Any]] = field(default_factory=dict)

    def reset(self) -> None:
        self.messages = {model: [] for model in self.models}

    def ask(self, question: str, show: Show) -> ChatTurn:
        """Every model's answer, shown as it grows. Ctrl-C ends the answers, not the conversation."""
        from openai import APIStatusError

        turn = ChatTurn(question, dict.fromkeys(self.models, ""))
        try:
            for model in self.models:
                for piece in self._answer(model, question):
                    turn.answers[model] += piece
                    show(turn.answers)
        except KeyboardInterrupt:
            turn.error = "stopped by you"
        except APIStatusError as error:
            turn.error = error.message
            return turn
        for model, answer in turn.answers.items():
            self.messages[model] += [_message("user", question), _message("assistant", answer)]
        return turn

    def _answer(self, model: str, question: str) -> Iterator[str]:
        messages = [*self.messages[model], _message("user", question)]
        options: dict[str, Any] = {"max_tokens": self.most_tokens}
        with self.client.chat.completions.create(model=model, messages=messages, stream=True, **options) as stream:
            for chunk in stream:
                yield chunk.choices[0].delta.content or ""


def chat(store: StoreSpec, model: str, base: bool, most_tokens: int, shows: bool) -> list[ChatTurn]:
    """Chat until the input ends: every turn. base: the untuned base answers too. shows: print the answers as they grow."""
    from openai import OpenAI

    assignment = RegistryFollower(store, parse_model_name(model, "chat")).poll()
    assert assignment  # the first call finds a version or raises
    label = assignment.served.label
    signal.signal(signal.SIGINT, signal.default_int_handler)
    key = secrets.token_urlsafe()
    # Two requests: one that was stopped may still be at its last token.
    limits = RequestLimits(prompt_tokens=_PROMPT_TOKENS, answer_tokens=most_tokens, requests=2)
    job = ServeJob(assignment=assignment, host=_LOOPBACK, port=0, on_loopback=True, limits=limits, shadow_file=None)
    endpoint = Endpoint(store, job, note, key)
    endpoint.start()
    try:
        client = OpenAI(base_url=f"http://{_LOOPBACK}:{endpoint.port}/v1", api_key=key, max_retries=0, timeout=None)
        if base and BASE not in {one.id for one in client.models.list()}:
            act = "leave --base out, or ask the base in another program"
            raise ConfigError(Problem(f"{label} was trained in all weights: it has no untuned base", "--base", act=act))
        conversation = ChatSession(client, [label, BASE] if base else [label], most_tokens)
        conversation.reset()
        return _turns(conversation, shows)
    finally:
        endpoint.stop()


def _turns(conversation: ChatSession, shows: bool) -> list[ChatTurn]:
    turns: list[ChatTurn] = []
    for question in _questions():
        if question == _QUIT:
            break
        if question == _RESET:
            conversation.reset()
            continue
        turns.append(_shown(conversation, question) if shows else conversation.ask(question, lambda answers: None))
    return turns


def _questions() -> Iterator[str]:
    """Lines that hold something, from a person or from a pipe."""
    is_person = sys.stdin.isatty()
    if is_person:
        import readline  # noqa: F401 input() edits and remembers lines with it

        note(f"{_RESET} starts over, {_QUIT} or Ctrl-D ends")
    try:
        while True:
            if question := input("> " if is_person else "").strip():
                yield question
    except (EOFError, KeyboardInterrupt):
        return


def _shown(conversation: ChatSession, question: str) -> ChatTurn:
    """A turn on the page: growing in a terminal, at once elsewhere."""
    console = page(sys.stdout)
    if console.is_terminal:
        with Live(console=console, refresh_per_second=8) as live:
            turn = conversation.ask(question, lambda answers: live.update(_columns(answers)))
    else:
        turn = conversation.ask(question, lambda answers: None)
        console.print(_columns(turn.answers))
    if turn.error:
        note(turn.error)
    return turn


def _columns(answers: dict[str, str]) -> Table:
    table = Table(expand=True)
    for model in answers:
        table.add_column(Text(model), ratio=1)
    table.add_row(*map(Text, answers.values()))
    return table


def _message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}
