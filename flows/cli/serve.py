"""`tunegate serve`, `chat`, `shadow`: a registered version answers clients, a person, and next to its challenger."""

from functools import partial
from typing import Annotated

import typer

from flows.cli.options import AsJson, Name, StoreChanges, prepared_store
from flows.cli.output import Outcome

serve_app = typer.Typer()

Model = Annotated[str, typer.Argument(metavar="MODEL", help="NAME, NAME@champion or NAME/3.")]


@serve_app.command("serve")
def serve_command(
    model: Model,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: a free one.")] = 8000,
    host: Annotated[
        str, typer.Option("--host", help="Where to listen. Beyond loopback only with a key in TUNEGATE_API_KEY.")
    ] = "127.0.0.1",
    shadow: Annotated[
        str | None,
        typer.Option("--shadow", metavar="MODEL", help="Ask this one the same, and keep both answers in the store."),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Longest prompt taken.")] = 2048,
    answer_tokens: Annotated[int, typer.Option("--answer-tokens", min=1, help="Longest answer written.")] = 512,
    requests: Annotated[int, typer.Option("--requests", min=1, help="Requests taken at the same time.")] = 8,
    changes: StoreChanges = None,
    as_json: AsJson = False,
) -> Outcome:
    """Answer over HTTP as OpenAI's API does. An alias is followed: when it moves, the new version answers, without a restart."""
    store = prepared_store(changes)
    from data_contracts.jobs.serving import RequestLimits
    from flows.serve import serve as start
    from flows.serve import show_serving

    limits = RequestLimits(prompt_tokens=prompt_tokens, answer_tokens=answer_tokens, requests=requests)
    serving = start(store, model, host, port, limits, shadow)
    return Outcome(serving.payload, partial(show_serving, serving.payload), then=serving.keep)


@serve_app.command("chat")
def chat_command(
    model: Model,
    base: Annotated[bool, typer.Option("--base", help="The untuned base answers too.")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")] = 256,
    changes: StoreChanges = None,
    as_json: AsJson = False,
) -> Outcome:
    """Talk to a registered version in the terminal. /reset starts a new conversation, /quit ends. Lines from a pipe are taken too."""
    store = prepared_store(changes)
    from flows.cli.chat import chat

    turns = chat(store, model, base, max_new_tokens, shows=not as_json)
    failed = any(turn.error for turn in turns)
    payload = {"turns": [turn.payload() for turn in turns]}
    return Outcome(payload, lambda console: None, 2 if failed else 0)  # a page has shown them one by one


@serve_app.command("shadow")
def shadow_command(name: Name, changes: StoreChanges = None, as_json: AsJson = False) -> Outcome:
    """How the challenger answered what the champion was asked, where `serve --shadow` has kept both."""
    store = prepared_store(changes)
    from flows.cli.pages.export import show_shadow
    from tasks.serving.shadow import compare_shadow

    report, file = compare_shadow(store, name)
    payload = report.model_dump(mode="json") | {"file": str(file)}
    return Outcome(payload, partial(show_shadow, report, file))
