"""The whole chain: raw data to a gated, registered model. Reads top to bottom."""

from typing import Any

from prefect import flow
from prefect.runtime import flow_run
from prefect.states import Completed

from data_contracts.data_reports import DatasetManifest, FileRef
from data_contracts.reports import BaseModelRef, EvalReport, EvalTarget, RunReport, Slot, TrainReport
from data_contracts.run_spec import DOMAIN_TASKS, RunSpec, ServingForm
from data_contracts.train_spec import arms_of, candidate_arm
from data_contracts.verdict import Served
from flows.prepare_data import data_stages
from flows.runner import Stages, in_store
from flows.services.crashed_runs import hold, mark_crashed
from flows.train_arms import beginnings, train_arms
from tasks.data import watermark
from tasks.evaluation.evaluate import task_files
from tasks.models.base import base_identity
from tasks.pipeline import notifications as notify
from tasks.pipeline import stages
from tasks.pipeline.run_lock import me, turn
from tasks.release import champion as rivals
from tasks.release import history as moves
from tasks.release import registry
from tasks.release.champion import Rival
from tasks.reporting import prefect_artifacts as artifacts
from tasks.runtime.console import note
from tasks.runtime.store import Store
from tasks.training.slots import slots_of

BY_HAND = "started by hand"


def retrain(spec: RunSpec, force: bool = False, reason: str = BY_HAND) -> RunReport | None:
    """Run the flow with its results kept in the spec's store; None if it gave way to another run."""
    report: RunReport | None = in_store(retrain_flow, spec)(spec, force, reason)
    return report


@flow(
    name="retrain", result_serializer="json", on_running=[hold, notify.run_begins], on_completion=[notify.run_ends],
    on_failure=[notify.run_fails], on_crashed=[notify.run_fails],
)  # fmt: skip
def retrain_flow(spec: RunSpec, force: bool = False, reason: str = BY_HAND) -> Any:
    """The run's RunReport, or a state named Skipped if another run works in this store and `when_busy` says so."""
    store = Store.of(spec.store)
    with turn(store, me(flow_run.id, flow_run.name), spec.schedule.when_busy, note) as own:
        if not own.mine:
            return Completed(name="Skipped", message=f"at work already: {own.other or 'another run'}", data=None)
        if own.other:
            mark_crashed(own.other)
        return chain(Stages.of(spec, force), spec, reason)


def chain(run: Stages, spec: RunSpec, reason: str) -> Any:
    """Every stage, in order."""
    store = Store.of(spec.store)
    for line in moves.reconcile(spec.store):
        note(line)
    slots = slots_of(spec.train)
    dataset = data_stages(run, spec)
    base, arms = train_stages(run, spec, dataset, slots)

    candidate = released_of(arms)
    rival = rivals.rival(spec.store, spec.model.name, candidate.adapter, base)
    targets = [target_of(arm) for arm in arms] + forms_of(candidate, spec.evaluate.forms)
    evaluations = evaluate(run, spec, base, dataset.test, targets, rival)
    scores = next(report for report in evaluations if report.target == candidate.name)

    comparison = run.run(stages.compare, store, arms, evaluations, candidate.arm, candidate.name, spec.gates)
    served = serve(run, spec, base, dataset.test, target_of(candidate))
    gates = run.run(stages.gate, comparison, spec.gates, rival.label if rival else None, True, served)
    artifacts.show_verdict(arms, evaluations, comparison, gates)
    recorded = run.run(stages.record, spec, dataset, arms, evaluations, comparison, gates)
    told = rival.label if rival else None
    made_of = (base, candidate, arms, evaluations, dataset, comparison, gates, told, recorded)
    model = run.run(stages.register, spec, *made_of)
    answer = run.run(stages.load_back, spec.store, model, scores, spec.evaluate.sample_tokens)
    if gates.verdict == "pass":
        run.run(stages.promote, spec.store, model, answer, rival.version if rival else None)
    else:
        run.skip("promote", f"the verdict is {gates.verdict}: the version stays challenger")
    page = run.run(stages.write_report, store, spec, dataset, arms, evaluations, comparison, gates, recorded, model)
    report = RunReport(
        run_id=f"{flow_run.name}-{flow_run.id[:8]}", reason=reason, spec=spec.model_dump(mode="json"), dataset=dataset,
        base=base, arms=arms, evaluations=evaluations, comparison=comparison, gate=gates, recorded=recorded,
        model=registry.version_now(spec.store, model), loaded_back=answer, stages=run.done, html=page,
    )  # fmt: skip
    store.write_report(report)
    watermark.finish(store, spec.model.name, dataset.snapshot_id, report.run_id)
    artifacts.show_report(report)
    return run.end(report)


def train_stages(
    run: Stages, spec: RunSpec, data: DatasetManifest, slots: list[Slot]
) -> tuple[BaseModelRef, list[TrainReport]]:
    """Every arm over the same rows in the same order, unless a warm start has its own; LoRA's from the same adapter."""
    store = Store.of(spec.store)
    base = run.run(stages.prepare_base, store, spec.model.base, spec.model.revision, base_identity(spec.model))
    planned = arms_of(spec.train)
    begins = beginnings(run, spec, base, data, planned)
    if set(spec.evaluate.tasks) - set(DOMAIN_TASKS):
        own = task_files(spec.evaluate)
        run.run(stages.check_tasks, store, base, data.test, spec.evaluate, own, spec.train.max_tokens)
    return base, train_arms(run, spec, base, data, planned, begins, slots)


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


def evaluate(
    run: Stages, spec: RunSpec, base: BaseModelRef, test: FileRef, targets: list[EvalTarget], rival: Rival | None
) -> list[EvalReport]:
    """Score the base, every target and the rival on the frozen items."""
    store = Store.of(spec.store)
    targets = [EvalTarget(name="base", method="lora"), *targets]
    targets += [rival.target] if rival and rival.target else []
    settings = (spec.evaluate, task_files(spec.evaluate), spec.train.max_tokens, spec.model.precision)
    reports: list[EvalReport] = run.run(
        stages.evaluate, store, base, test, targets, *settings, spec.gates.confidence, spec.train.threads
    )
    return reports


def serve(run: Stages, spec: RunSpec, base: BaseModelRef, test: FileRef, target: EvalTarget) -> Served | None:
    """The candidate alone in a process, measured; only if a gate asks for it."""
    if spec.gates.max_ms_per_token is None and spec.gates.max_memory_gb is None:
        return None
    store, settings = Store.of(spec.store), (spec.evaluate, spec.train.max_tokens, spec.model.precision)
    served: Served = run.run(stages.serve_alone, store, base, test, target, *settings, spec.train.threads)
    return served
