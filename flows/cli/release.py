"""`tunegate promote`, `rollback`, `history`, `predict`: a registered model goes into production, back, and answers."""

from functools import partial
from typing import Annotated

import typer

from data_contracts.errors import ConfigError, Problem
from flows.cli.options import AsJson, Name, StoreChanges, prepared_store
from flows.cli.output import Outcome

release_app = typer.Typer()
ReasonOption = Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why; kept in the promotion ledger.")]


@release_app.command("promote")
def promote_command(
    name: Name,
    version: Annotated[
        str | None, typer.Option("--version", help="Version number; the challenger if left out.")
    ] = None,
    override: Annotated[bool, typer.Option("--override", help="Promote though its gates or the check say no.")] = False,
    reason: ReasonOption = "",
    changes: StoreChanges = None,
    as_json: AsJson = False,
) -> Outcome:
    """Make a version the champion, if its gates passed and it still is what they judged."""
    _needs_reason(override, reason, "promote")
    store = prepared_store(changes)
    from flows.cli.pages.release import moved_summary, show_moved
    from flows.promote import promote

    found = promote(store, name, version, override, reason)
    return Outcome(moved_summary(found), partial(show_moved, found))


@release_app.command("rollback")
def rollback_command(
    name: Name,
    override: Annotated[bool, typer.Option("--override", help="Though the check says no, or cannot be made.")] = False,
    reason: ReasonOption = "",
    changes: StoreChanges = None,
    as_json: AsJson = False,
) -> Outcome:
    """Make the last good champion before this one the champion again."""
    _needs_reason(override, reason, "rollback")
    store = prepared_store(changes)
    from flows.cli.pages.release import moved_summary, show_moved
    from flows.promote import rollback

    found = rollback(store, name, override, reason)
    return Outcome(moved_summary(found), partial(show_moved, found))


def _needs_reason(override: bool, reason: str, act: str) -> None:
    if override and not reason.strip():
        raise ConfigError(Problem("--override without --reason", act, act='add --reason "why"'))


@release_app.command("history")
def history_command(
    name: Name,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Write a changed ledger again from the registry.")] = False,
    changes: StoreChanges = None,
    as_json: AsJson = False,
) -> Outcome:
    """Every move of a model's champion: who, when, from, to, why, on what evidence. Exit code 4 if the record is broken."""
    store = prepared_store(changes)
    from flows.cli.pages.release import BROKEN, history_summary, show_history
    from flows.promote import read_history

    found = read_history(store, name, rebuild=rebuild)
    return Outcome(history_summary(found), partial(show_history, found), BROKEN if found.problems else 0)


@release_app.command("predict")
def predict_command(
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
    from flows.promote import ask_registered

    answer = ask_registered(store, model, question, max_new_tokens)
    payload = {"question": question, "answer": answer, "model": model}
    return Outcome(payload, lambda console: console.print(answer, markup=False, soft_wrap=True))
