"""Arguments and options that several commands share."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from tasks.runtime.console import page

if TYPE_CHECKING:  # `--help` need not wait for pydantic
    from data_contracts.run_spec import RunSpec, StoreSpec


Preset = Annotated[str | None, typer.Argument(help="Preset (demo, smoke) or a .yaml file; demo if left out.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; repeatable.")
]
StoreChanges = Annotated[
    list[str] | None, typer.Option("--set", metavar="store.root=DIR", help="Where the store is; repeatable.")
]
# Declared so that --help lists it; main() reads it, because stdout must be redirected before anything runs.
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")]
Force = Annotated[bool, typer.Option("--force", help="Run every stage again, also those done before.")]
Details = Annotated[bool, typer.Option("--details", help="Print the full tables below the summary.")]
Name = Annotated[str, typer.Argument(help="Name in the registry.")]


def prepared_spec(preset: str | None, changes: list[str] | None, title: str | None = None) -> "RunSpec":
    """The spec of a preset or file with its changes. title: what is started, if not the preset by its name."""
    from flows.config.load import DEFAULT_PRESET, load_spec
    from flows.services.environment import make_homes, prepare_environment

    spec = load_spec(preset, changes or []).spec
    prepare_environment(spec.store)
    make_homes(spec.store)
    # Prefect's imports and its server take seconds before the first stage can say anything.
    page(sys.stderr).print(
        f"{title or preset or DEFAULT_PRESET}: starting, store {spec.store.root}", style="dim", markup=False
    )
    return spec


def prepared_store(changes: list[str] | None) -> "StoreSpec":
    """An existing store, for commands that need nothing else of a spec."""
    from flows.config.load import load_store
    from flows.services.environment import prepare_environment, require_store

    store = load_store(changes or [])
    require_store(store)
    prepare_environment(store)
    return store


def preset_of(model: str, changes: list[str] | None) -> str:
    """The spec file that a registered version was made with."""
    store = prepared_store([change for change in changes or [] if change.startswith("store.")])
    from flows.gate import recorded_preset

    return recorded_preset(store, model)
