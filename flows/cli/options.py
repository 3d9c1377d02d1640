"""Arguments and options that several commands share."""

from typing import Annotated

import typer

Preset = Annotated[str | None, typer.Argument(help="Preset (demo, smoke) or a .yaml file; demo if left out.")]
Changes = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one dial; repeatable.")]
StoreChanges = Annotated[
    list[str] | None, typer.Option("--set", metavar="store.root=DIR", help="Where the store lies; repeatable.")
]
# Declared so that --help lists it; main() reads it, because stdout must be set aside before anything runs.
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")]
Force = Annotated[bool, typer.Option("--force", help="Run every stage again, also those done before.")]
Name = Annotated[str, typer.Argument(help="Name in the registry.")]
