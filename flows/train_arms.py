"""Every arm of a run, one after the other or several at the same time."""

from pathlib import Path
from typing import Any

from data_contracts.arms import Arm
from data_contracts.data_reports import DatasetManifest
from data_contracts.reports import BaseModelRef, Slot, TrainReport
from data_contracts.run_spec import RunSpec
from flows.cli.output import tell
from flows.runner import Stages
from flows.starts import Begin
from tasks.pipeline import stages
from tasks.reporting import prefect_artifacts as artifacts
from tasks.runtime.store import Store


def train_arms(
    run: Stages, spec: RunSpec, base: BaseModelRef, data: DatasetManifest, arms: list[Arm], begins: list[Begin],
    slots: list[Slot],
) -> list[TrainReport]:  # fmt: skip
    """In the order of the arms. slots: where those of a group train; none if each trains alone."""
    if slots:
        tell(f"{len(slots)} arms train at a time, each on {slots[0].threads} threads: {slots[0].why}")
    store = Store(Path(spec.store.root))
    calls = [
        (arm, (arm.method, arm.seed, base, begin.adapter, begin.rows, data.validation, arm.dials, spec.model.precision))
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
    *before, dials, precision = inputs
    return (*before, dials.model_copy(update={"threads": trained[0].threads}), precision)


def groups(keys: list[str], most: int) -> list[list[int]]:
    """Numbers of the keys in order, so many at a time. Equal keys are one training: the second waits for the first."""
    found: list[list[int]] = []
    for number, key in enumerate(keys):
        if found and len(found[-1]) < most and key not in {keys[other] for other in found[-1]}:
            found[-1].append(number)
        else:
            found.append([number])
    return found
