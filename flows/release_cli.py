"""`tunegate promote`, `rollback`, `predict`: a registered model goes into production, back, and answers."""

from functools import partial
from typing import Annotated

import typer

from data_contracts.errors import ConfigError, Problem
from flows.console import Outcome
from flows.options import AsJson, Name, StoreChanges
from flows.prepared import prepared_store

release_app = typer.Typer()


@release_app.command()
def promote(
    name: Name,
    version: Annotated[
        str | None, typer.Option("--version", help="Version number; the challenger if left out.")
    ] = None,
    override: Annotated[bool, typer.Option("--override", help="Promote though its gates said no.")] = False,
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why; kept with the version.")] = "",
    changes: StoreChanges = None,
    as_json: AsJson = False,
) -> Outcome:
    """Make a version the champion, if its gates passed."""
    if override and not reason.strip():
        raise ConfigError(Problem("--override without --reason", "promote", act='add --reason "why"'))
    store = prepared_store(changes)
    from flows.release import promote as set_champion
    from flows.summary import model_summary
    from flows.tables import show_version

    found = set_champion(store, name, version, override, reason)
    return Outcome(model_summary(found), partial(show_version, found))


@release_app.command()
def rollback(name: Name, changes: StoreChanges = None, as_json: AsJson = False) -> Outcome:
    """Make the champion before this one the champion again."""
    store = prepared_store(changes)
    from flows.release import rollback as set_back
    from flows.summary import model_summary
    from flows.tables import show_version

    found = set_back(store, name)
    return Outcome(model_summary(found), partial(show_version, found))


@release_app.command()
def predict(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    model: Annotated[str, typer.Option("--model", metavar="URI", help="models:/NAME@champion, for example.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")] = 64,
    changes: StoreChanges = None,
    as_json: AsJson = False,
) -> Outcome:
    """Ask a registered model."""
    if not question.strip():
        raise ConfigError(
            Problem("the question is empty", "predict", act='tunegate predict "what does ...?" --model URI')
        )
    store = prepared_store(changes)
    from flows.release import ask

    answer = ask(store, model, question, max_new_tokens)
    payload = {"question": question, "answer": answer, "model": model}
    return Outcome(payload, lambda console: console.print(answer, markup=False, soft_wrap=True))
