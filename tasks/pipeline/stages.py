"""The Prefect tasks: one for each stage, thin. What each does is in the module it calls; policies are in policies.py.

A parameter annotated HASHED_ONLY is part of the cache key and nothing else.
"""

from typing import Annotated

from prefect.runtime import task_run

from data_contracts.data_reports import DatasetManifest, FileRef, Snapshot, ValidatedData
from data_contracts.data_spec import CurateSpec, DataSpec
from data_contracts.jobs.models import StartSettings
from data_contracts.reports import (
    AdapterRef,
    BaseModelRef,
    EvalReport,
    EvalTarget,
    LoadedBack,
    ModelVersion,
    RecordedRun,
    Slot,
    Start,
    TrainReport,
)
from data_contracts.run_spec import EvaluateSpec, GateSpec, RunSpec, StoreSpec
from data_contracts.stage_inputs import (
    HASHED_ONLY,
    CurationInputs,
    EvaluationInputs,
    RunResult,
    StartInputs,
    TrainInputs,
    ValidationInputs,
)
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
from tasks.release.lineage import Registration
from tasks.reporting import html_report, mlflow_run
from tasks.reporting.prefect_artifacts import LiveTraining
from tasks.runtime.fingerprint import code_digest
from tasks.runtime.processes import Launch
from tasks.runtime.store import Store
from tasks.training import train, warm_start

# --- data ---------------------------------------------------------------------------------------------------


@stage("ingest")
def ingest_stage(store: Store, data: DataSpec, sources: Annotated[dict[str, str], HASHED_ONLY]) -> Snapshot:
    """sources: sha256 of each source's content, or what a server says of its version."""
    return ingestion.ingest_sources(store, data)


@stage("validate")
def validate_stage(
    store: Store, inputs: ValidationInputs, promises: Annotated[dict[str, str], HASHED_ONLY], engine: str
) -> ValidatedData:
    """promises: digests of the contract's suites and of the rule function's file, which settings only name."""
    checks = validate.Checks(inputs.rules, inputs.contract, inputs.released)
    return validate.validate(store, inputs.snapshot, checks, inputs.reference, engine, is_forced())


@stage("benchmarks")
def benchmarks_stage(store: Store, tasks: list[str], task_files: FileRef | None) -> FileRef:
    return evaluation.benchmark_items(store, tasks, task_files)


@stage("curate")
def curate_stage(store: Store, inputs: CurationInputs, spec: CurateSpec, engine: str) -> DatasetManifest:
    curation_ = curation.Curation(spec, inputs.scope, inputs.contradictions, inputs.benchmarks)
    return curation.curate_rows(store, inputs.validated, curation_, engine)


# --- models -------------------------------------------------------------------------------------------------


@stage("prepare_base")
def prepare_base_stage(
    store: Store, base: str, revision: str | None, identity: Annotated[str, HASHED_ONLY]
) -> BaseModelRef:
    """identity: of the base's files, or the hub's commit."""
    return bases.prepare_base(store, base, revision)


@stage("init_adapter")
def init_adapter_stage(store: Store, base: BaseModelRef, settings: StartSettings) -> AdapterRef:
    return bases.init_adapter(store, base, settings, force=is_forced())


@stage("choose_start")
def choose_start_stage(store: Store, inputs: StartInputs, share: float) -> Start:
    """share: of replayed old rows among the training rows."""
    return warm_start.choose_start(store, inputs, share)


@stage("check_tasks")
def check_tasks_stage(
    store: Store, base: BaseModelRef, test: FileRef, spec: EvaluateSpec,
    task_files: Annotated[FileRef | None, HASHED_ONLY], max_tokens: int,
) -> list[str]:  # fmt: skip
    """task_files: the user's own lm-eval tasks, which the step finds by the spec's folder."""
    return evaluation.check_tasks(store, base, test, spec, max_tokens)


def train_key(inputs: TrainInputs) -> str:
    """Two arms with the same key are one training."""
    return stage_key("train", {"inputs": inputs})


@stage("train")
def train_stage(store: Store, inputs: TrainInputs, slot: Slot | None = None) -> TrainReport:
    name = task_run.name.removeprefix("train ")
    launch = Launch(f"train {name}", is_forced(), LiveTraining(name).show)
    return train.train_arm(store, train_key(inputs), inputs, launch, slot)


# --- evaluation ---------------------------------------------------------------------------------------------


@stage("evaluate")
def evaluate_stage(
    store: Store, inputs: EvaluationInputs, targets: list[EvalTarget], confidence: float
) -> list[EvalReport]:
    return evaluation.evaluate_targets(store, inputs, targets, confidence, force=is_forced())


@stage("compare")
def compare_stage(
    store: Store, arms: list[TrainReport], evaluations: list[EvalReport], candidate: str, released: str, gates: GateSpec
) -> Comparison:
    """candidate: an arm; released: the one adapter of it that may be registered."""
    return comparisons.compare_models(store, arms, evaluations, candidate, released, gates)


@stage("serve_alone")
def serve_alone_stage(store: Store, inputs: EvaluationInputs, target: EvalTarget) -> Served:
    return evaluation.serve_alone(store, inputs, target)


@stage("gate")
def gate_stage(
    comparison: Comparison, gates: GateSpec, champion: str | None, has_baseline: bool, served: Served | None
) -> GateReport:
    """champion: label of the version to compare with; has_baseline: whether a full-precision LoRA arm was trained."""
    return judge(comparison, gates, champion, has_baseline=has_baseline, served=served)


# --- release ------------------------------------------------------------------------------------------------


@stage("record")
def record_stage(spec: RunSpec, result: RunResult) -> RecordedRun:
    return mlflow_run.record_run(spec, stage_key("record", {"spec": spec, "result": result}), result)


@stage("register")
def register_stage(spec: RunSpec, result: RunResult, recorded: RecordedRun) -> ModelVersion:
    key = stage_key("register", {"arm": result.candidate, "gates": result.gate, "recorded": recorded})
    code = code_digest(POLICIES["train"].code)
    return registration.register_version(Registration(spec, result, recorded, key, code))


@stage("load_back")
def load_back_stage(store: StoreSpec, model: ModelVersion, scores: EvalReport, sample_tokens: int) -> LoadedBack:
    return release_check.load_back(store, model, scores, sample_tokens)


@stage("promote")
def promote_stage(store: StoreSpec, model: ModelVersion, loaded_back: LoadedBack, champion: str | None) -> ModelVersion:
    """champion: the version that the gates compared this one with."""
    return promotion.promote_version(
        store, model.name, model.version, compared_with=champion or promotion.NO_CHAMPION, check=loaded_back.check
    )


@stage("report")
def report_stage(store: Store, spec: RunSpec, result: RunResult, recorded: RecordedRun, model: ModelVersion) -> str:
    return html_report.write_html_report(store, spec, result, recorded, model)
