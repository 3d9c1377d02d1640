"""Versions that start from one another: split, trained, registered and promoted for real.

Their scores are planted, the base is tiny, and workers run in the test's own process.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from data_contracts.data_reports import DatasetManifest
from data_contracts.jobs import Job
from data_contracts.reports import AdapterRef, BaseModelRef, Origin, RecordedRun, Start, TrainReport
from data_contracts.run_spec import ModelSpec, RunSpec, StoreSpec
from data_contracts.stage_inputs import RunResult, StartInputs, TrainInputs
from data_contracts.train_spec import TrainSpec, arms_of
from data_contracts.verdict import GateReport
from tasks.models.base import init_adapter, start_settings
from tasks.release import registry
from tasks.release.lineage import Registration
from tasks.release.promotion import NO_CHAMPION, promote_version
from tasks.release.register import register_version
from tasks.runtime.mlflow_client import connect, open_experiment
from tasks.runtime.processes import Launch
from tasks.runtime.store import Store, digest
from tasks.training import train
from tasks.training.warm_start import choose_start, origin_of, start_from_scratch
from tests.support.curated import facts
from tests.support.curated import run as curate_rows
from tests.support.planted import planted, scores

NAME = "grows"
SETTINGS = {
    "methods": ["lora"], "rank": 4, "alpha": 8, "learning_rate": 1e-2, "max_steps": 3, "batch_tokens": 512,
    "max_tokens": 256, "threads": 1, "warm_start": "champion",
}  # fmt: skip


class Generation(NamedTuple):
    data: DatasetManifest
    start: Start
    arm: TrainReport
    version: str


class Place:
    """A store with a tiny base; workers run in this process."""

    def __init__(self, root: Path, base: Path):
        self.store = Store(root)
        (self.store.files / "bases").mkdir(parents=True)
        (self.store.files / "bases" / "tiny").symlink_to(base)
        self.base = BaseModelRef(
            name="tiny", digest=digest(base), path="bases/tiny", note="", revision=None, stops=["</s>"],
            chat_template=None,
        )  # fmt: skip
        self.model = StoreSpec(root=str(root))

    def spec(self, **settings) -> RunSpec:
        return RunSpec(model=ModelSpec(name=NAME), train=TrainSpec(**SETTINGS | settings), store=self.model)

    def fresh(self, **settings) -> AdapterRef:
        own = start_settings("lora", 17, TrainSpec(**SETTINGS | settings), "fp32")
        assert own
        return init_adapter(self.store, self.base, own)

    def origin(self, data: DatasetManifest) -> Origin:
        return origin_of(self.model, NAME, self.store.path(data.train))[0]

    def start(self, data: DatasetManifest, share: float = 0.5, base: BaseModelRef | None = None, **settings) -> Start:
        origin = self.origin(data)
        if origin.version is None:
            return start_from_scratch(self.store, data.train, origin.note)
        return choose_start(self.store, self.inputs(data, origin=origin, base=base or self.base, **settings), share)

    def inputs(
        self, data: DatasetManifest, origin: Origin, base: BaseModelRef | None = None, **settings
    ) -> StartInputs:
        return StartInputs(
            origin=origin, base=base or self.base, step0=self.fresh(**settings), train=data.train,
            held_out=[data.validation, data.test],
        )  # fmt: skip

    def generation(self, rows: int) -> Generation:
        """Split, start, train, register, promote."""
        data = curate_rows(self.store, facts(rows), test_fraction=0.2, validation_fraction=0.1)
        start = self.start(data)
        settings = arms_of(self.spec().train)[0].settings
        key = f"train-{digest(self.store.path(start.rows))}"
        inputs = TrainInputs(
            method="lora", seed=17, base=self.base, step0=start.adapter or self.fresh(), rows=start.rows,
            validation=data.validation, settings=settings, precision="fp32",
        )  # fmt: skip
        arm = train.train_arm(self.store, key, inputs, Launch("train lora")).model_copy(update={"start": start})
        return Generation(data, start, arm, self.register(data, arm))

    def register(self, data: DatasetManifest, arm: TrainReport, judged: str | None = None) -> str:
        import mlflow

        client = connect(self.model)
        open_experiment(client, self.model, NAME)
        with mlflow.start_run() as run:
            pass
        recorded = RecordedRun(mlflow_run_id=run.info.run_id, arm_run_ids={"lora": run.info.run_id})
        file = self.store.files / "report.json"
        file.write_text("")
        data = data.model_copy(update={"contract_result": self.store.ref(file)})
        files = {name: self.store.ref(file) for name in ("samples", "facts")}
        own = scores("lora", 2.0).model_copy(update=files | {"adapter_sha256": arm.adapter.sha256})
        result = RunResult(
            base=self.base, dataset=data, candidate=arm, arms=[arm], evaluations=[own],
            comparison=planted(self.store.root).comparison, gate=GateReport(gates=[], off=[], verdict="pass"),
            champion=None,
        )  # fmt: skip
        made = Registration(self.spec(), result, recorded, f"register-{arm.adapter.sha256}-{judged}", "c")
        version = register_version(made).version
        now = registry.alias_version(client, NAME, registry.CHAMPION)
        promote_version(self.model, NAME, version, compared_with=judged or now or NO_CHAMPION)
        return version


@pytest.fixture(scope="module", autouse=True)
def workers_here() -> Iterator[None]:
    from tasks.models.workers import init_adapter as step0_worker
    from tasks.training.workers import train_adapter

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tasks.runtime.partitions.free_cores", lambda: 1)  # two parts are no work for two processes
        patch.setattr(
            "tasks.training.train.run_worker", lambda module, job, out, *_: _here(train_adapter.train, job, out)
        )
        patch.setattr(
            "tasks.models.base.run_worker", lambda module, job, out, *_: _here(step0_worker.make_step0, job, out)
        )
        yield


def _here(work, job: Job, out: Path) -> dict:
    out.mkdir(parents=True, exist_ok=True)
    return work(job, out)
