"""What a command works on, with the environment set before Prefect, MLflow or Hugging Face are imported."""

import sys
from typing import TYPE_CHECKING

from flows.cli.output import page

if TYPE_CHECKING:  # `--help` need not wait for pydantic
    from data_contracts.run_spec import RunSpec, StoreSpec


def prepared_spec(preset: str | None, changes: list[str] | None) -> "RunSpec":
    """The spec of a preset or file with its changes."""
    from flows.config.load import DEFAULT_PRESET, load_spec
    from flows.services.environment import make_homes, prepare_environment

    spec = load_spec(preset, changes or []).spec
    prepare_environment(spec.store)
    make_homes(spec.store)
    # Prefect's imports and its server take seconds before the first stage can say anything.
    page(sys.stderr).print(f"{preset or DEFAULT_PRESET}: starting, store {spec.store.root}", style="dim", markup=False)
    return spec


def prepared_store(changes: list[str] | None) -> "StoreSpec":
    """A store that is there, for commands that need nothing else."""
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
