"""`tunegate export`: a registered model leaves the store, in a form that was measured."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import AsJson, Changes, StoreChanges, prepared_store
from flows.cli.output import Outcome

# Between what rounding costs and what another base costs, by measurement: docs/export.md.
_TOLERANCE_NATS = 0.01
export_app = typer.Typer()


@export_app.command("export")
def export_command(
    model: Annotated[str, typer.Argument(metavar="URI", help="models:/NAME@champion, for example.")],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Empty or not there; complete or absent afterwards.")],
    form: Annotated[str, typer.Option("--format", metavar="adapter|merged|gguf", help="What to write.")] = "merged",
    base: Annotated[
        str | None, typer.Option("--base", metavar="full|dequantised", help="Merge into this one; else the nearer one.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="fp32|bf16|fp16|q8_0", help="Store so; else by measurement.")
    ] = None,
    tolerance_nats: Annotated[
        float, typer.Option("--tolerance-nats", min=0.0, help="Largest KL from the live model, per answer token.")
    ] = _TOLERANCE_NATS,
    items: Annotated[
        int, typer.Option("--items", min=1, help="Held-out rows to measure on, and half as many texts.")
    ] = 32,
    changes: StoreChanges = None,
    as_json: AsJson = False,
) -> Outcome:
    """Write a registered model as adapter, merged weights or GGUF, measured against the live model."""
    store = prepared_store(changes)
    from flows.cli.pages.export import show_export
    from flows.export import export_version
    from tasks.export.request import ExportRequest

    found = export_version(store, model, to, ExportRequest.of(form, base, dtype, tolerance_nats, items))
    return Outcome({"to": str(to), **found.model_dump(mode="json")}, partial(show_export, found, to))


_CODES = {"identical": 0, "equal within tolerance": 0, "different": 1}


@export_app.command("reproduce")
def reproduce_command(
    model: Annotated[str, typer.Argument(metavar="URI", help="models:/NAME/VERSION or models:/NAME@ALIAS.")],
    changes: Changes = None,
    as_json: AsJson = False,
) -> Outcome:
    """Make a version again from its lineage: identical, equal within tolerance, or what differs and why."""
    store = prepared_store([change for change in changes or [] if change.startswith("store.")])
    from flows.reproduce import reproduce, show_reproduction

    found = reproduce(store, model, changes or [])
    return Outcome(found.payload(), partial(show_reproduction, found), _CODES[found.result])
