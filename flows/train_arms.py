"""Every arm of a run, one after the other or several at the same time."""

from typing import Any, NamedTuple

from data_contracts.data_reports import DatasetManifest, FileRef
from data_contracts.reports import AdapterRef, BaseModelRef, Slot, Start, TrainReport
from data_contracts.run_spec import RunSpec
from data_contracts.train_spec import LORA_ARMS, Arm
from flows.runner import Stages
from tasks.models.base import start_settings
from tasks.pipeline import stages
from tasks.reporting import prefect_artifacts as artifacts
from tasks.reporting.sentences import started
from tasks.runtime.console import note
from tasks.runtime.store import Store
from tasks.training.warm_start import origin_of, start_from_scratch


class Begin(NamedTuple):
    """adapter: None starts from the base itself; start: None if no warm start was asked for."""

    adapter: AdapterRef | None
    rows: FileRef
    start: Start | None


def train_arms(
    run: Stages, spec: RunSpec, base: BaseModelRef, data: DatasetManifest, arms: list[Arm], begins: list[Begin],
    slots: list[Slot],
) -> list[TrainReport]:  # fmt: skip
    """In the order of the arms. slots: where those of a group train; none if each trains alone."""
    if slots:
        note(f"{len(slots)} arms train at a time, each on {slots[0].threads} threads: {slots[0].why}")
    store = Store.of(spec.store)
    calls = [
        (
            arm,
            (
                arm.method,
                arm.seed,
                base,
                begin.adapter,
                begin.rows,
                data.validation,
                arm.settings,
                spec.model.precision,
            ),
        )
        for arm, begin in zip(arms, begins, strict=True)
    ]
    trained: list[TrainReport] = []
    for group in groups([stages.train_key(*inputs) for _, inputs in calls], max(1, len(slots))):
        named = []
        for place, number in enumerate(group):
            arm, inputs = calls[number]
            slot = slots[place] if slots else None
            named.append((f"train {arm.name}", (store, *_with_threads(inputs, trained, slot), slot)))
        for number, report in zip(group, run.together(stages.train_arm, named), strict=True):
            # The same training may be known under another name: as one of several seeds, or as a variant.
            own = {"name": arms[number].name, "arm": arms[number].arm, "start": begins[number].start}
            trained.append(report.model_copy(update=own))
            artifacts.show_training(trained[-1])
    return trained


def _with_threads(inputs: tuple[Any, ...], trained: list[TrainReport], slot: Slot | None) -> tuple[Any, ...]:
    """Arms on unlike threads could not be compared for speed: all take what was free for the first."""
    if slot or not trained:
        return inputs
    *before, settings, precision = inputs
    return (*before, settings.model_copy(update={"threads": trained[0].threads}), precision)


def groups(keys: list[str], most: int) -> list[list[int]]:
    """Numbers of the keys in order, so many at a time. Equal keys are one training: the second waits for the first."""
    found: list[list[int]] = []
    for number, key in enumerate(keys):
        if found and len(found[-1]) < most and key not in {keys[other] for other in found[-1]}:
            found[-1].append(number)
        else:
            found.append([number])
    return found


def beginnings(run: Stages, spec: RunSpec, base: BaseModelRef, data: DatasetManifest, arms: list[Arm]) -> list[Begin]:
    """One for each arm. LoRA's arms share a fresh adapter, and so what a warm start puts in its place."""
    fresh = fresh_adapters(run, Store.of(spec.store), base, arms, spec.model.precision)
    starts = warm_starts(run, spec, base, data, arms, fresh)
    return [
        Begin((start and start.adapter) or adapter, start.rows if start else data.train, start)
        for adapter, start in zip(fresh, starts, strict=True)
    ]


def fresh_adapters(
    run: Stages, store: Store, base: BaseModelRef, arms: list[Arm], precision: str
) -> list[AdapterRef | None]:
    """Each arm's fresh step-0 adapter, or None; the same one where it is made from the same settings."""
    settings = [start_settings(arm.method, arm.seed, arm.settings, precision) for arm in arms]
    made: dict[str, AdapterRef] = {}
    for own in settings:
        if own and str(own) not in made:
            made[str(own)] = run.run(stages.init_adapter, store, base, own)
    return [made.get(str(own)) for own in settings]


def warm_starts(
    run: Stages, spec: RunSpec, base: BaseModelRef, data: DatasetManifest, arms: list[Arm],
    fresh: list[AdapterRef | None],
) -> list[Start | None]:  # fmt: skip
    """Each arm's start if it was to go on from the champion, else None; every one is said aloud with its reason."""
    if all(arm.settings.warm_start == "never" for arm in arms):
        return [None] * len(arms)
    store, held_out = Store.of(spec.store), [data.validation, data.test]
    origin, passed = origin_of(spec.store, spec.model.name, store.path(data.train))
    for line in passed:
        note(line)
    if origin.version is None:
        run.skip("choose_start", f"from scratch: {origin.note}")
    made: dict[str, Start] = {}
    found: list[Start | None] = []
    for arm, adapter in zip(arms, fresh, strict=True):
        key = f"{adapter and adapter.sha256} {arm.settings.replay_share}"
        if arm.settings.warm_start == "never":
            start = None
        elif origin.version is None:
            start = start_from_scratch(store, data.train, origin.note)
        elif arm.method not in LORA_ARMS or adapter is None:
            start = start_from_scratch(store, data.train, f"the method {arm.method} has no LoRA layers to go on with")
        else:
            inputs = (store, origin, base, adapter, data.train, held_out, arm.settings.replay_share)
            start = made[key] = made.get(key) or run.run(stages.choose_start, *inputs)
        if start and origin.version:
            note(f"{arm.name} {started(start)}")
        found.append(start)
    return found
