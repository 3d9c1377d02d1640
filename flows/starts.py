"""What each arm's training begins with: a fresh adapter, or the champion's; and the rows it then sees."""

from pathlib import Path
from typing import NamedTuple

from data_contracts.arms import Arm
from data_contracts.data_reports import DatasetManifest, FileRef
from data_contracts.method_rules import LORA_ARMS
from data_contracts.reports import AdapterRef, BaseModelRef, Start
from data_contracts.run_spec import RunSpec
from flows.cli.output import tell
from flows.runner import Stages
from tasks.models.base import start_dials
from tasks.pipeline import stages
from tasks.reporting.sentences import started
from tasks.runtime.store import Store
from tasks.training.warm_start import origin_of, scratch


class Begin(NamedTuple):
    """adapter: None starts from the base itself; start: None if no warm start was asked for."""

    adapter: AdapterRef | None
    rows: FileRef
    start: Start | None


def beginnings(run: Stages, spec: RunSpec, base: BaseModelRef, data: DatasetManifest, arms: list[Arm]) -> list[Begin]:
    """One for each arm. LoRA's arms share a fresh adapter, and so what a warm start puts in its place."""
    fresh = fresh_adapters(run, Store(Path(spec.store.root)), base, arms, spec.model.precision)
    starts = warm_starts(run, spec, base, data, arms, fresh)
    return [
        Begin((start and start.adapter) or adapter, start.rows if start else data.train, start)
        for adapter, start in zip(fresh, starts, strict=True)
    ]


def fresh_adapters(
    run: Stages, store: Store, base: BaseModelRef, arms: list[Arm], precision: str
) -> list[AdapterRef | None]:
    """Each arm's fresh step-0 adapter, or None; the same one where it is made from the same dials."""
    dials = [start_dials(arm.method, arm.seed, arm.dials, precision) for arm in arms]
    made: dict[str, AdapterRef] = {}
    for own in dials:
        if own and str(own) not in made:
            made[str(own)] = run.run(stages.init_adapter, store, base, own)
    return [made.get(str(own)) for own in dials]


def warm_starts(
    run: Stages, spec: RunSpec, base: BaseModelRef, data: DatasetManifest, arms: list[Arm],
    fresh: list[AdapterRef | None],
) -> list[Start | None]:  # fmt: skip
    """Each arm's start if it was to go on from the champion, else None; every one is said aloud with its reason."""
    if all(arm.dials.warm_start == "never" for arm in arms):
        return [None] * len(arms)
    store, held_out = Store(Path(spec.store.root)), [data.validation, data.test]
    origin, passed = origin_of(spec.store, spec.model.name, store.path(data.train))
    for line in passed:
        tell(line)
    if origin.version is None:
        run.skip("choose_start", f"from scratch: {origin.told}")
    made: dict[str, Start] = {}
    found: list[Start | None] = []
    for arm, adapter in zip(arms, fresh, strict=True):
        key = f"{adapter and adapter.sha256} {arm.dials.replay_share}"
        if arm.dials.warm_start == "never":
            start = None
        elif origin.version is None:
            start = scratch(store, data.train, origin.told)
        elif arm.method not in LORA_ARMS or adapter is None:
            start = scratch(store, data.train, f"the method {arm.method} has no LoRA layers to go on with")
        else:
            inputs = (store, origin, base, adapter, data.train, held_out, arm.dials.replay_share)
            start = made[key] = made.get(key) or run.run(stages.choose_start, *inputs)
        if start and origin.version:
            tell(f"{arm.name} {started(start)}")
        found.append(start)
    return found
