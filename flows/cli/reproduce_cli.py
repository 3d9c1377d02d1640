"""`tunegate reproduce`: a registered version made again, and whether it is the same."""

from functools import partial
from typing import Annotated

import typer

from flows.cli.options import AsJson, Changes
from flows.cli.output import Outcome
from flows.cli.prepared import prepared_store

reproduce_app = typer.Typer()
_CODES = {"identical": 0, "equal within tolerance": 0, "different": 1}


@reproduce_app.command()
def reproduce(
    model: Annotated[str, typer.Argument(metavar="URI", help="models:/NAME/VERSION or models:/NAME@ALIAS.")],
    changes: Changes = None,
    as_json: AsJson = False,
) -> Outcome:
    """Make a version again from its lineage: identical, equal within tolerance, or what differs and why."""
    store = prepared_store([change for change in changes or [] if change.startswith("store.")])
    from flows.reproduce import reproduce as make_again
    from flows.reproduce import show_reproduction

    found = make_again(store, model, changes or [])
    return Outcome(found.payload(), partial(show_reproduction, found), _CODES[found.result])
