"""Make a registered version again from its lineage and compare: the same rows, start, settings and seed, nothing from a cache."""

import shutil
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from prefect import flow

from data_contracts.errors import ConfigError, Problem
from data_contracts.lineage import EVIDENCE, Reproduction
from data_contracts.run_spec import RunSpec, StoreSpec
from flows.config.load import load_spec
from flows.services.crashed_runs import hold
from tasks.pipeline.device_lock import device_slot
from tasks.pipeline.policies import POLICIES
from tasks.release import registry
from tasks.reproduction.dataset import rebuild_splits
from tasks.reproduction.reproduce import (
    Rebuilt,
    Retrained,
    base_again,
    begin_again,
    compare_again,
    recorded_adapter,
    recorded_dataset,
    reproduction_report,
    train_again,
    working_place,
)
from tasks.runtime.console import note
from tasks.runtime.fingerprint import code_digest
from tasks.runtime.mlflow_client import SPEC_FILE
from tasks.runtime.store import Store

if TYPE_CHECKING:
    from rich.console import Console

_MAY_CHANGE = (
    "data.source", "model.base", "contract.suite", "contract.batch_suite", "rules.function", "evaluate.task_folder",
    "train.threads",
)  # fmt: skip
"""Settings that may be changed: places on this machine, which no lineage holds, and how many threads train."""


def reproduction_spec(store: StoreSpec, uri: str, changes: list[str]) -> tuple[RunSpec, int | None]:
    """The recorded spec in this store, and the threads if they were changed. Raises ConfigError for any other change."""
    keys = [change.partition("=")[0].strip() for change in changes]
    limit = ", ".join(_MAY_CHANGE)
    wrong = [
        Problem(f"{key} is what it was then", "--set", limit, "leave it out")
        for key in keys
        if key not in _MAY_CHANGE and not key.startswith("store.")
    ]
    if wrong:
        raise ConfigError(*wrong)
    version = registry.resolve(store, uri, "reproduce")
    registry.recorded_lineage(store, version)
    loaded = load_spec(str(version.artifacts / EVIDENCE / SPEC_FILE), changes)
    spec = loaded.spec.model_copy(update={"store": store})
    return spec, spec.train.threads if "train.threads" in keys else None


def reproduce(store: StoreSpec, uri: str, changes: list[str]) -> Reproduction:
    """Run the flow. Raises DataError or ConfigError if what it was made from cannot be had."""
    spec, threads = reproduction_spec(store, uri, changes)
    found: Reproduction = reproduce_flow(spec, uri, threads)
    return found


@flow(name="reproduce", result_serializer="json", on_running=[hold])
def reproduce_flow(spec: RunSpec, uri: str, threads: int | None = None) -> Reproduction:
    """Rows, base, start, training, comparison."""
    # Rows of the place are named by absolute paths: in a store named by a relative path they would be resolved twice.
    started, store = time.monotonic(), Store(Path(spec.store.root).resolve())
    version = registry.resolve(spec.store, uri, "reproduce")
    then = registry.recorded_lineage(spec.store, version)
    recorded_adapter(version, then)
    with working_place(store, version) as place, device_slot(f"reproduce {version.label}"):
        rows = rebuild_splits(store, place, spec, then, recorded_dataset(version))
        note(f"rows: {rows.note}")
        base = base_again(store, place, spec, then)
        rebuilt = Rebuilt(base, rows, begin_again(spec, place, base, then, rows))
        arm = train_again(place, base, rebuilt.start, rows, then, threads or then.machine.threads)
        distance = compare_again(spec, place, rebuilt, version, then, arm)
        retrained = Retrained(arm, distance, place.path(arm.adapter.folder).relative_to(store.files).as_posix())
        code, seconds = code_digest(POLICIES["train"].code), time.monotonic() - started
        found = reproduction_report(uri, then, rebuilt, retrained, code, seconds)
        if found.kept is None:
            shutil.rmtree(place.root)
    return found


def show_reproduction(found: Reproduction, console: "Console") -> None:
    """Everything then and now, then what is not the same in words."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("", "then", "now", "same?"):
        table.add_column(name, overflow="fold")
    for item in found.compared:
        table.add_row(item.what, _short(item.then), _short(item.now), "yes" if item.same else "NO")
    table.add_row(
        "adapter", _short(found.adapter_then), _short(found.adapter_now), "yes" if found.distance is None else "NO"
    )
    console.print(table)
    print_line = partial(console.print, markup=False, soft_wrap=True)
    print_line(f"rows: {found.data}")
    if found.distance is not None:
        print_line(f"largest distance of a tensor: {found.distance:.2e} of its norm")
        print_line(
            f"held-out loss: {found.loss_then_nats} then, {found.loss_now_nats} now, nats per token, both measured now"
        )
    if found.kept:
        print_line(f"what was trained now: {found.kept}")
    for reason in found.reasons:
        print_line(f"may be why: {reason}")
    print_line(f"{found.model} made again in {found.seconds:.0f} s: {found.result.upper()}")


def _short(text: str) -> str:
    is_digest = len(text) == 64 and all(character in "0123456789abcdef" for character in text)
    return text[:12] if is_digest else text
