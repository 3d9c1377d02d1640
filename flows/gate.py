"""Evaluate a registered version and decide: the door for CI."""

from dataclasses import replace

from prefect import flow

from data_contracts.errors import ConfigError, Problem
from data_contracts.reports import AdapterRef, EvalTarget
from data_contracts.run_spec import RunSpec, StoreSpec
from data_contracts.verdict import Decision
from flows.prepare_data import data_stages
from flows.retrain import evaluate, serve
from flows.runner import Stages, in_store
from flows.services.crashed_runs import hold
from tasks.models.base import base_identity
from tasks.pipeline import stages
from tasks.release import judgements as judged
from tasks.release import registry
from tasks.release.champion import Rival, as_rival
from tasks.release.registry import Registered
from tasks.reporting import prefect_artifacts as artifacts
from tasks.runtime.store import Store


def recorded_preset(store: StoreSpec, model_uri: str) -> str:
    """The spec file that the version was made with: it is gated on its own data unless another preset is named."""
    return registry.recorded_spec(store, registry.resolve(store, model_uri))


def gate(spec: RunSpec, model_uri: str, baseline_uri: str | None = None) -> Decision:
    """Run the flow with its results kept in the spec's store."""
    decision: Decision = in_store(gate_flow, spec)(spec, model_uri, baseline_uri)
    return decision


@flow(name="gate", result_serializer="json", on_running=[hold])
def gate_flow(spec: RunSpec, model_uri: str, baseline_uri: str | None = None) -> Decision:
    """Score the version, the untuned base and the baseline on the spec's frozen items, and judge; the judgement is kept with
    the version, for `tunegate promote`."""
    run, store = Stages.of(spec, flow="gate"), Store.of(spec.store)
    version = registry.resolve(spec.store, model_uri)
    rival = rival_of(spec.store, version, baseline_uri)
    dataset = data_stages(run, spec)
    base = run.run(stages.prepare_base, store, spec.model.base, spec.model.revision, base_identity(spec.model))
    if version.base_digest != base.digest:
        what = f"{model_uri} stands on another base than {base.name}"
        raise ConfigError(Problem(what, "model.base", act="set model.base to its own"))
    adapter = AdapterRef(folder=version.adapter, sha256=version.adapter_sha256)
    own = EvalTarget(name="candidate", method=version.method, adapter=adapter, quantisation=version.quantisation)
    evaluations = evaluate(run, spec, base, dataset.test, [own], rival)
    comparison = run.run(stages.compare, store, [], evaluations, "candidate", "candidate", spec.gates)
    served = serve(run, spec, base, dataset.test, own)
    label = rival.label if rival else None
    report = run.run(stages.gate, comparison, spec.gates, label, False, served)
    artifacts.show_verdict([], evaluations, comparison, report)
    decision = Decision(
        model=model_uri, name=version.name, version=version.version, champion=label, gate=report, comparison=comparison
    )
    scores = next(report for report in evaluations if report.target == own.name)
    judged.keep(spec.store, version, rival.adapter_sha256 if rival else None, decision, scores)
    return decision


def rival_of(store: StoreSpec, version: Registered, baseline_uri: str | None) -> Rival | None:
    """The version named, else the champion, else None. Raises ConfigError if the one named stands on another base.

    Where that is the version itself it is measured all the same, to a difference of zero: the first-run rule, which
    is for models without a champion, would be no true reason.
    """
    named = registry.resolve(store, baseline_uri, "--baseline") if baseline_uri else None
    if named and named.base_digest != version.base_digest:
        what = f"{baseline_uri} stands on another base than {version.name} version {version.version}"
        raise ConfigError(Problem(what, "--baseline", act="name a version of the same base: losses compare only there"))
    found = named or registry.champion(store, version.name)
    if found is None:
        return None
    rival = as_rival(found, version.base_digest)
    same = found.adapter_sha256 == version.adapter_sha256
    return replace(rival, label=f"{rival.label} (the candidate itself)") if same else rival
