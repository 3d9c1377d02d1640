"""Every arm of a run, one after the other or several at the same time."""

from dataclasses import dataclass

from data_contracts.data_reports import DatasetManifest
from data_contracts.reports import AdapterRef, BaseModelRef, Slot, Start, TrainReport
from data_contracts.run_spec import RunSpec
from data_contracts.stage_inputs import StartInputs, TrainInputs
from data_contracts.train_spec import LORA_ARMS, Arm, arms_of
from flows.runner import Call, Stages
from tasks.models.base import start_settings
from tasks.pipeline import stages
from tasks.reporting import prefect_artifacts as artifacts
from tasks.reporting.sentences import start_sentence
from tasks.runtime.console import note
from tasks.runtime.store import Store
from tasks.training.warm_start import origin_of, start_from_scratch


@dataclass(frozen=True)
class PlannedArm:
    """An arm and all that decides what it learns. start: None if no warm start was asked for."""

    arm: Arm
    inputs: TrainInputs
    start: Start | None


def plan_arms(run: Stages, spec: RunSpec, base: BaseModelRef, data: DatasetManifest) -> list[PlannedArm]:
    """Every arm with its first adapter and its rows. LoRA's arms share a fresh adapter, and so what a warm start puts in
    its place."""
    arms = arms_of(spec.train)
    fresh = fresh_adapters(run, Store.of(spec.store), base, arms, spec.model.precision)
    starts = warm_starts(run, spec, base, data, arms, fresh)
    return [
        PlannedArm(
            arm, _inputs(arm, base, data, spec.model.precision, (start and start.adapter) or adapter, start), start
        )
        for arm, adapter, start in zip(arms, fresh, starts, strict=True)
    ]


def _inputs(
    arm: Arm, base: BaseModelRef, data: DatasetManifest, precision: str, step0: AdapterRef | None, start: Start | None
) -> TrainInputs:
    return TrainInputs(
        method=arm.method,
        seed=arm.seed,
        base=base,
        step0=step0,
        rows=start.rows if start else data.train,
        validation=data.validation,
        settings=arm.settings,
        precision=precision,
    )


def train_arms(run: Stages, store: Store, planned: list[PlannedArm], slots: list[Slot]) -> list[TrainReport]:
    """In the order of the arms. slots: where those of a group train; none if each trains alone."""
    if slots:
        note(f"{len(slots)} arms train at a time, each on {slots[0].threads} threads: {slots[0].why}")
    trained: list[TrainReport] = []
    for group in groups([stages.train_key(own.inputs) for own in planned], max(1, len(slots))):
        calls = []
        for place, number in enumerate(group):
            slot = slots[place] if slots else None
            inputs = _with_threads(planned[number].inputs, trained, slot)
            calls.append(Call.of(f"train {planned[number].arm.name}", stages.train_stage, store, inputs, slot))
        for number, report in zip(group, run.together(calls), strict=True):
            # The same training may be known under another name: as one of several seeds, or as a variant.
            own = planned[number]
            named = {"name": own.arm.name, "arm": own.arm.arm, "start": own.start}
            trained.append(report.model_copy(update=named))
            artifacts.publish_training(trained[-1])
    return trained


def _with_threads(inputs: TrainInputs, trained: list[TrainReport], slot: Slot | None) -> TrainInputs:
    """Arms on different numbers of threads could not be compared for speed: all take what was free for the first."""
    if slot or not trained:
        return inputs
    settings = inputs.settings.model_copy(update={"threads": trained[0].threads})
    return inputs.model_copy(update={"settings": settings})


def groups(keys: list[str], most: int) -> list[list[int]]:
    """Numbers of the keys in order, so many at a time. Equal keys are one training: the second waits for the first."""
    found: list[list[int]] = []
    for number, key in enumerate(keys):
        if found and len(found[-1]) < most and key not in {keys[other] for other in found[-1]}:
            found[-1].append(number)
        else:
            found.append([number])
    return found


def fresh_adapters(
    run: Stages, store: Store, base: BaseModelRef, arms: list[Arm], precision: str
) -> list[AdapterRef | None]:
    """Each arm's fresh step-0 adapter, or None; the same one where it is made from the same settings."""
    settings = [start_settings(arm.method, arm.seed, arm.settings, precision) for arm in arms]
    made: dict[str, AdapterRef] = {}
    for own in settings:
        if own and str(own) not in made:
            made[str(own)] = run.run(stages.init_adapter_stage, store, base, own)
    return [made.get(str(own)) for own in settings]


def warm_starts(
    run: Stages, spec: RunSpec, base: BaseModelRef, data: DatasetManifest, arms: list[Arm],
    fresh: list[AdapterRef | None],
) -> list[Start | None]:  # fmt: skip
    """Each arm's start if it was to resume from the champion, else None; every one is logged with its reason."""
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
            start = start_from_scratch(store, data.train, f"the method {arm.method} has no LoRA layers to resume from")
        else:
            inputs = StartInputs(origin=origin, base=base, step0=adapter, train=data.train, held_out=held_out)
            if key not in made:
                made[key] = run.run(stages.choose_start_stage, store, inputs, arm.settings.replay_share)
            start = made[key]
        if start and origin.version:
            note(f"{arm.name} {start_sentence(start)}")
        found.append(start)
    return found
