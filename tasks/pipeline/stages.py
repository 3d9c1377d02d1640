"""The Prefect tasks: one for each stage, thin. What each does lies in the module it calls; policies in policies.py."""

from prefect.runtime import task_run

from data_contracts.data_reports import DatasetManifest, FileRef, Snapshot, ValidatedData
from data_contracts.data_spec import ContractSpec, CurateSpec, DataSpec, RulesSpec
from data_contracts.jobs.models import StartSettings
from data_contracts.reports import (
    AdapterRef,
    BaseModelRef,
    EvalReport,
    EvalTarget,
    LoadedBack,
    ModelVersion,
    Origin,
    RecordedRun,
    Slot,
    Start,
    TrainReport,
)
from data_contracts.rows import Action
from data_contracts.run_spec import EvaluateSpec, GateSpec, RunSpec, StoreSpec
from data_contracts.stage_inputs import StartInputs, TrainInputs
from data_contracts.train_spec import Method, TrainSpec
from data_contracts.verdict import Comparison, GateReport, Served
from tasks.data.curation import curate as curation
from tasks.data.ingestion import ingest as ingestion
from tasks.data.validation import validate
from tasks.evaluation import compare as comparisons
from tasks.evaluation import evaluate as evaluation
from tasks.evaluation.core.gates import judge
from tasks.models import base as bases
from tasks.pipeline.policies import POLICIES, is_forced, stage, stage_key
from tasks.release import promotion, release_check
from tasks.release import register as registration
from tasks.release.lineage import Made
from tasks.reporting import html_report as report
from tasks.reporting import mlflow_run as tracking
from tasks.reporting.prefect_artifacts import LiveTraining
from tasks.runtime.fingerprint import code_digest
from tasks.runtime.processes import Launch
from tasks.runtime.store import Store
from tasks.training import train, warm_start


@stage("ingest")
def ingest(store: Store, data: DataSpec, sources: dict[str, str]) -> Snapshot:
    return ingestion.ingest_sources(store, data)


@stage("validate")
def check(
    store: Store, snapshot: Snapshot, rules: RulesSpec, contract: ContractSpec, promises: dict[str, str],
    released: list[tuple[str, str]], reference: tuple[str, FileRef] | None, engine: str,
) -> ValidatedData:  # fmt: skip
    return validate.validate(
        store, snapshot, validate.Checks(rules, contract, released), reference, engine, is_forced()
    )


@stage("benchmarks")
def benchmarks(store: Store, tasks: list[str], task_files: FileRef | None) -> FileRef:
    return evaluation.benchmark_items(store, tasks, task_files)


@stage("curate")
def curate(
    store: Store, validated: ValidatedData, spec: CurateSpec, scope: str, contradictions: Action,
    benchmarks: FileRef | None, engine: str,
) -> DatasetManifest:  # fmt: skip
    return curation.curate_rows(store, validated, curation.Curation(spec, scope, contradictions, benchmarks), engine)


@stage("prepare_base")
def prepare_base(store: Store, base: str, revision: str | None, identity: str) -> BaseModelRef:
    return bases.prepare_base(store, base, revision)


@stage("init_adapter")
def init_adapter(store: Store, base: BaseModelRef, settings: StartSettings) -> AdapterRef:
    return bases.init_adapter(store, base, settings, force=is_forced())


@stage("choose_start")
def choose_start(
    store: Store, origin: Origin, base: BaseModelRef, step0: AdapterRef, train: FileRef, held_out: list[FileRef],
    share: float,
) -> Start:  # fmt: skip
    inputs = StartInputs(origin=origin, base=base, step0=step0, train=train, held_out=held_out)
    return warm_start.choose_start(store, inputs, share)


@stage("check_tasks")
def check_tasks(
    store: Store, base: BaseModelRef, test: FileRef, spec: EvaluateSpec, task_files: FileRef | None, max_tokens: int
) -> list[str]:
    return evaluation.check_tasks(store, base, test, spec, max_tokens)


def train_key(
    method: Method, seed: int, base: BaseModelRef, step0: AdapterRef | None, rows: FileRef, validation: FileRef,
    settings: TrainSpec, precision: str,
) -> str:  # fmt: skip
    """Two arms with the same key are one training."""
    inputs = {"method": method, "seed": seed, "base": base, "step0": step0, "rows": rows, "validation": validation}
    return stage_key("train", {**inputs, "settings": settings, "precision": precision})


@stage("train")
def train_arm(
    store: Store, method: Method, seed: int, base: BaseModelRef, step0: AdapterRef | None, rows: FileRef,
    validation: FileRef, settings: TrainSpec, precision: str, slot: Slot | None = None,
) -> TrainReport:  # fmt: skip
    values = (method, seed, base, step0, rows, validation, settings, precision)
    inputs = TrainInputs(**dict(zip(TrainInputs.model_fields, values, strict=True)))
    name = task_run.name.removeprefix("train ")
    launch = Launch(f"train {name}", is_forced(), LiveTraining(name).show)
    return train.train_arm(store, train_key(*values), inputs, launch, slot)


@stage("evaluate")
def evaluate(
    store: Store, base: BaseModelRef, test: FileRef, targets: list[EvalTarget], spec: EvaluateSpec,
    task_files: FileRef | None, max_tokens: int, precision: str, confidence: float, threads: int | None,
) -> list[EvalReport]:  # fmt: skip
    scoring = evaluation.ScoringInputs(base, test, spec, task_files, max_tokens, precision, threads)
    return evaluation.evaluate_targets(store, scoring, targets, confidence, force=is_forced())


@stage("compare")
def compare(
    store: Store, arms: list[TrainReport], evaluations: list[EvalReport], candidate: str, released: str, gates: GateSpec
) -> Comparison:
    return comparisons.compare_models(store, arms, evaluations, candidate, released, gates)


@stage("serve_alone")
def serve_alone(
    store: Store, base: BaseModelRef, test: FileRef, target: EvalTarget, spec: EvaluateSpec, max_tokens: int,
    precision: str, threads: int | None,
) -> Served:  # fmt: skip
    scoring = evaluation.ScoringInputs(base, test, spec, None, max_tokens, precision, threads)
    return evaluation.serve_alone(store, scoring, target)


@stage("gate")
def gate(
    comparison: Comparison, gates: GateSpec, champion: str | None, has_baseline: bool, served: Served | None
) -> GateReport:
    return judge(comparison, gates, champion, has_baseline=has_baseline, served=served)


@stage("record")
def record(
    spec: RunSpec, dataset: DatasetManifest, arms: list[TrainReport], evaluations: list[EvalReport],
    comparison: Comparison, gates: GateReport,
) -> RecordedRun:  # fmt: skip
    inputs = {"dataset": dataset, "arms": arms, "evaluations": evaluations, "comparison": comparison, "gates": gates}
    key = stage_key("record", {"spec": spec, **inputs})
    return tracking.record_run(spec, key, dataset, arms, evaluations, comparison, gates)


@stage("register")
def register(
    spec: RunSpec, base: BaseModelRef, arm: TrainReport, arms: list[TrainReport], evaluations: list[EvalReport],
    dataset: DatasetManifest, comparison: Comparison, gates: GateReport, rival: str | None, recorded: RecordedRun,
) -> ModelVersion:  # fmt: skip
    key = stage_key("register", {"arm": arm, "gates": gates, "recorded": recorded})
    code = code_digest(POLICIES["train"].code)
    made = Made(spec, key, code, base, arm, arms, evaluations, dataset, comparison, gates, rival, recorded)
    return registration.register_version(made)


@stage("load_back")
def load_back(store: StoreSpec, model: ModelVersion, scores: EvalReport, sample_tokens: int) -> LoadedBack:
    return release_check.load_back(store, model, scores, sample_tokens)


@stage("promote")
def promote(store: StoreSpec, model: ModelVersion, loaded_back: LoadedBack, champion: str | None) -> ModelVersion:
    judged = champion or "none"
    return promotion.promote_version(store, model.name, model.version, judged=judged, check=loaded_back.check)


@stage("report")
def write_report(
    store: Store, spec: RunSpec, dataset: DatasetManifest, arms: list[TrainReport], evaluations: list[EvalReport],
    comparison: Comparison, gates: GateReport, recorded: RecordedRun, model: ModelVersion,
) -> str:  # fmt: skip
    return report.write_report(store, spec, dataset, arms, evaluations, comparison, gates, recorded, model)
