"""Evaluate a registered version and decide: the door for CI."""

from dataclasses import replace

from prefect import flow

from data_contracts.errors import ConfigError, Problem
from data_contracts.reports import EvalTarget
from data_contracts.run_spec import RunSpec, StoreSpec
from data_contracts.verdict import Decision
from flows.prepare_data import data_stages
from flows.retrain import evaluation_inputs, measure_serving, score_models
from flows.runner import Stages, in_store
from flows.services.crashed_runs import hold
from tasks.models.base import base_identity
from tasks.pipeline import stages
from tasks.release import registry
from tasks.release.champion import ChampionBaseline, as_baseline
from tasks.release.judgements import keep_judgement
from tasks.release.registry import Registered
from tasks.reporting import prefect_artifacts as artifacts
from tasks.runtime.store import Store


def recorded_preset(store: StoreSpec, model_uri: str) -> str:
    """The spec file that the version was made with: it is gated on its own data unless another preset is named."""
    return registry.recorded_spec_file(store, registry.resolve(store, model_uri))


def gate(spec: RunSpec, model_uri: str, baseline_uri: str | None = None) -> Decision:
    """Run the flow with its results kept in the spec's store."""
    return in_store(gate_flow, spec)(spec, model_uri, baseline_uri)


@flow(name="gate", result_serializer="json", on_running=[hold])
def gate_flow(spec: RunSpec, model_uri: str, baseline_uri: str | None = None) -> Decision:
    """Score the version, the untuned base and the baseline on the spec's frozen items, and judge; the judgement is kept with
    the version, for `tunegate promote`."""
    run, store = Stages.of(spec, flow="gate"), Store.of(spec.store)
    version = registry.resolve(spec.store, model_uri)
    baseline = baseline_of(spec.store, version, baseline_uri)
    dataset = data_stages(run, spec)
    identity = base_identity(spec.model)
    base = run.run(stages.prepare_base_stage, store, spec.model.base, spec.model.revision, identity)
    if version.base_digest != base.digest:
        what = f"{model_uri} has a different base model than {base.name}"
        raise ConfigError(Problem(what, "model.base", act="set model.base to its own"))
    own = EvalTarget(
        name="candidate", method=version.method, adapter=version.adapter, quantisation=version.quantisation
    )
    scoring = evaluation_inputs(spec, base, dataset.test)
    evaluations = score_models(run, spec, scoring, [own], baseline)
    comparison = run.run(stages.compare_stage, store, [], evaluations, "candidate", "candidate", spec.gates)
    served = measure_serving(run, spec, scoring, own)
    label = baseline.label if baseline else None
    report = run.run(stages.gate_stage, comparison, spec.gates, label, has_baseline=False, served=served)
    artifacts.publish_verdict([], evaluations, comparison, report)
    decision = Decision(
        model=model_uri, name=version.name, version=version.version, champion=label, gate=report, comparison=comparison
    )
    scores = next(report for report in evaluations if report.target == own.name)
    keep_judgement(spec.store, version, baseline.adapter_sha256 if baseline else None, decision, scores)
    return decision


def baseline_of(store: StoreSpec, version: Registered, baseline_uri: str | None) -> ChampionBaseline | None:
    """The version named, else the champion, else None. Raises ConfigError if the one named has a different base model.

    Where that is the version itself it is still measured, with a difference of zero: the first-run rule, which
    is for models without a champion, would be no true reason.
    """
    named = registry.resolve(store, baseline_uri, "--baseline") if baseline_uri else None
    if named and named.base_digest != version.base_digest:
        what = f"{baseline_uri} has a different base model than {version.label}"
        raise ConfigError(Problem(what, "--baseline", act="name a version of the same base: losses compare only there"))
    found = named or registry.champion(store, version.name)
    if found is None:
        return None
    baseline = as_baseline(found, version.base_digest)
    is_same = found.adapter.sha256 == version.adapter.sha256
    return replace(baseline, label=f"{baseline.label} (the candidate itself)") if is_same else baseline
