"""The whole chain: raw data to a gated, registered model. Reads top to bottom."""

from prefect import flow
from prefect.runtime import flow_run

from data_contracts.data_reports import DatasetManifest, FileRef
from data_contracts.reports import BaseModelRef, EvalReport, EvalTarget, RunReport, Slot, TrainReport
from data_contracts.run_spec import DOMAIN_TASKS, RunSpec, ServingForm
from data_contracts.stage_inputs import EvaluationInputs, RunResult
from data_contracts.train_spec import candidate_arm
from data_contracts.verdict import Served
from flows.prepare_data import data_stages
from flows.runner import Stages, in_store, skipped
from flows.services.crashed_runs import hold, mark_crashed
from flows.train_arms import plan_arms, train_arms
from tasks.data import watermark
from tasks.evaluation.evaluate import task_files
from tasks.models.base import base_identity
from tasks.pipeline import notifications as notify
from tasks.pipeline import stages
from tasks.pipeline.run_lock import Holder, hold_run_lock
from tasks.release import registry
from tasks.release.champion import ChampionBaseline, champion_baseline
from tasks.release.history import reconcile
from tasks.reporting import prefect_artifacts as artifacts
from tasks.runtime.console import note
from tasks.runtime.store import Store
from tasks.training.slots import slots_of

BY_HAND = "started by hand"


def retrain(spec: RunSpec, force: bool = False, reason: str = BY_HAND) -> RunReport | None:
    """Run the flow with its results kept in the spec's store; None if it gave way to another run."""
    return in_store(retrain_flow, spec)(spec, force, reason)


@flow(
    name="retrain", result_serializer="json", on_running=[hold, notify.run_begins], on_completion=[notify.run_ends],
    on_failure=[notify.run_fails], on_crashed=[notify.run_fails],
)  # fmt: skip
def retrain_flow(spec: RunSpec, force: bool = False, reason: str = BY_HAND) -> RunReport | None:
    """The run's report; None, in a state named Skipped, if another run works in this store and `when_busy` says so."""
    store = Store.of(spec.store)
    holder = Holder.this_process(flow_run.id, flow_run.name)
    with hold_run_lock(store, holder, spec.schedule.when_busy, note) as lock:
        if not lock.acquired:
            return skipped(result=None, why=f"already running: {lock.busy or 'another run'}")
        if lock.crashed:
            mark_crashed(lock.crashed)
        return chain(Stages.of(spec, force=force), spec, reason)


def chain(run: Stages, spec: RunSpec, reason: str) -> RunReport:
    """Every stage, in order."""
    store = Store.of(spec.store)
    for line in reconcile(spec.store):
        note(line)
    dataset = data_stages(run, spec)
    base, arms = train_stages(run, spec, dataset, slots_of(spec.train))
    candidate = released_of(arms)
    baseline = champion_baseline(spec.store, spec.model.name, candidate.adapter, base)

    scoring = evaluation_inputs(spec, base, dataset.test)
    targets = [target_of(arm) for arm in arms] + forms_of(candidate, spec.evaluate.forms)
    evaluations = score_models(run, spec, scoring, targets, baseline)
    comparison = run.run(stages.compare_stage, store, arms, evaluations, candidate.arm, candidate.name, spec.gates)
    served = measure_serving(run, spec, scoring, target_of(candidate))
    champion = baseline.label if baseline else None
    gate = run.run(stages.gate_stage, comparison, spec.gates, champion, has_baseline=True, served=served)
    artifacts.publish_verdict(arms, evaluations, comparison, gate)
    result = RunResult(
        base=base, dataset=dataset, candidate=candidate, arms=arms, evaluations=evaluations, comparison=comparison,
        gate=gate, champion=champion,
    )  # fmt: skip
    report = release_stages(run, spec, result, baseline, reason)
    store.write_report(report)
    watermark.finish(store, spec.model.name, dataset.snapshot_id, report.run_id)
    artifacts.publish_report(report)
    return run.end(report)


def release_stages(
    run: Stages, spec: RunSpec, result: RunResult, baseline: ChampionBaseline | None, reason: str
) -> RunReport:
    """Record, register, load back, promote if the gates passed, report."""
    store = Store.of(spec.store)
    recorded = run.run(stages.record_stage, spec, result)
    model = run.run(stages.register_stage, spec, result, recorded)
    answer = run.run(stages.load_back_stage, spec.store, model, result.scores, spec.evaluate.sample_tokens)
    if result.gate.verdict == "pass":
        run.run(stages.promote_stage, spec.store, model, answer, baseline.version if baseline else None)
    else:
        run.skip("promote", f"the verdict is {result.gate.verdict}: the version stays challenger")
    page = run.run(stages.report_stage, store, spec, result, recorded, model)
    return RunReport(
        run_id=f"{flow_run.name}-{flow_run.id[:8]}", reason=reason, spec=spec.model_dump(mode="json"),
        dataset=result.dataset, base=result.base, arms=result.arms, evaluations=result.evaluations,
        comparison=result.comparison, gate=result.gate, recorded=recorded,
        model=registry.version_now(spec.store, model), loaded_back=answer, stages=run.done, html=page,
    )  # fmt: skip


def train_stages(
    run: Stages, spec: RunSpec, data: DatasetManifest, slots: list[Slot]
) -> tuple[BaseModelRef, list[TrainReport]]:
    """Every arm over the same rows in the same order, unless a warm start has its own; LoRA's from the same adapter."""
    store = Store.of(spec.store)
    identity = base_identity(spec.model)
    base = run.run(stages.prepare_base_stage, store, spec.model.base, spec.model.revision, identity)
    planned = plan_arms(run, spec, base, data)
    if set(spec.evaluate.tasks) - set(DOMAIN_TASKS):
        own, settings = task_files(spec.evaluate), spec.evaluate
        run.run(stages.check_tasks_stage, store, base, data.test, settings, own, spec.train.max_tokens)
    return base, train_arms(run, store, planned, slots)


def released_of(arms: list[TrainReport]) -> TrainReport:
    """The one adapter that may be released: the first seed's of the candidate arm. To choose the best of several by the
    test split would make its numbers too good."""
    candidate = candidate_arm([arm.arm for arm in arms])
    return next(arm for arm in arms if arm.arm == candidate)


def target_of(arm: TrainReport) -> EvalTarget:
    return EvalTarget(name=arm.name, method=arm.method, adapter=arm.adapter, quantisation=arm.quantisation)


def forms_of(arm: TrainReport, forms: list[ServingForm]) -> list[EvalTarget]:
    """The same adapter as it may be served elsewhere; without 4 bits there is no other form."""
    if arm.quantisation is None:
        return []
    own = {"method": arm.method, "adapter": arm.adapter}
    return [EvalTarget(name=f"{arm.name}-on-{form}", merged=form == "merged", **own) for form in forms]


def evaluation_inputs(spec: RunSpec, base: BaseModelRef, test: FileRef) -> EvaluationInputs:
    """What every evaluation of a run shares."""
    return EvaluationInputs(
        base=base, test=test, spec=spec.evaluate, task_files=task_files(spec.evaluate),
        max_tokens=spec.train.max_tokens, precision=spec.model.precision, threads=spec.train.threads,
    )  # fmt: skip


def score_models(
    run: Stages, spec: RunSpec, inputs: EvaluationInputs, targets: list[EvalTarget], baseline: ChampionBaseline | None
) -> list[EvalReport]:
    """Score the base, every target and the champion on the frozen items."""
    targets = [EvalTarget(name="base", method="lora"), *targets]
    targets += [baseline.target] if baseline and baseline.target else []
    return run.run(stages.evaluate_stage, Store.of(spec.store), inputs, targets, spec.gates.confidence)


def measure_serving(run: Stages, spec: RunSpec, inputs: EvaluationInputs, target: EvalTarget) -> Served | None:
    """The candidate alone in a process, measured; only if a gate asks for it."""
    if spec.gates.max_ms_per_token is None and spec.gates.max_memory_gb is None:
        return None
    return run.run(stages.serve_alone_stage, Store.of(spec.store), inputs, target)
