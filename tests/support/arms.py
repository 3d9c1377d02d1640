"""Arms of one run, trained by the real flow: a store with rows, a tiny base and the step-0 adapter they share."""

from pathlib import Path
from typing import NamedTuple

from data_contracts.data_reports import DatasetManifest, FileRef
from data_contracts.reports import BaseModelRef, Slot, TrainReport
from data_contracts.run_spec import RunSpec, StoreSpec
from data_contracts.stage_inputs import TrainInputs
from data_contracts.train_spec import Arm, TrainSpec, arms_of
from tasks.models.integrity import adapter_ref
from tasks.runtime.store import Store, digest
from tests.conftest import step0_job, toy_rows, write_rows
from tests.support.planted import dataset

SHORT = {
    "rank": 4, "alpha": 8, "learning_rate": 1e-2, "max_steps": 30, "epochs": 10, "batch_tokens": 512, "max_tokens": 256,
    "threads": 1, "checkpoint_steps": 100,
}  # fmt: skip


class Trained(NamedTuple):
    arms: list[TrainReport]
    times: list[tuple[float, float]]  # of each worker: its start and its end


class Place:
    """A store with rows, a base and the arms' shared step-0 adapter."""

    def __init__(self, root: Path, base: Path) -> None:
        from tasks.models.workers.init_adapter import make_step0

        self.store = Store(root)
        (self.store.files / "bases").mkdir(parents=True)
        (self.store.files / "bases" / "tiny").symlink_to(base)
        write_rows(self.store.files / "train.jsonl", toy_rows(80))
        write_rows(self.store.files / "validation.jsonl", toy_rows(4, first=200))
        make_step0(step0_job(base), self.store.files / "step0")
        self.step0 = adapter_ref(self.store, self.store.files / "step0" / "adapter")
        self.base = BaseModelRef(
            name="tiny", digest=digest(base), path="bases/tiny", note="", revision=None, stops=[], chat_template=None
        )

    def data(self) -> DatasetManifest:
        names = {name: self.store.ref(self.store.files / f"{name}.jsonl") for name in ("train", "validation")}
        return dataset().model_copy(update=names)

    def inputs(self, arm: Arm, rows: FileRef) -> TrainInputs:
        return TrainInputs(
            method=arm.method, seed=arm.seed, base=self.base, step0=self.step0, rows=rows,
            validation=self.data().validation, settings=arm.settings, precision="auto",
        )  # fmt: skip

    def train(self, slots: list[Slot], lost: str | None = None, **settings) -> Trained:
        """lost: the arm whose rows are gone."""
        from prefect import flow

        from flows.runner import Stages
        from flows.train_arms import PlannedArm, train_arms

        spec = RunSpec(train=TrainSpec(**SHORT | settings), store=StoreSpec(root=str(self.store.root)))
        arms, data = arms_of(spec.train), self.data()
        gone = data.train.model_copy(update={"path": "gone.jsonl", "sha256": "0"})
        planned = [PlannedArm(arm, self.inputs(arm, gone if arm.name == lost else data.train), None) for arm in arms]

        @flow(result_storage=self.store.root / "results")
        def alone() -> list[TrainReport]:
            return train_arms(Stages.of(spec), self.store, planned, slots)

        (self.store.root / "results").mkdir(exist_ok=True)
        trained = alone()
        folders = [self.store.path(report.adapter.folder).parent for report in trained]
        times = [tuple((folder / name).stat().st_mtime for name in ("spec.json", "report.json")) for folder in folders]
        return Trained(trained, times)
