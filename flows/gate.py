"""Evaluate a registered version and decide: the door for CI."""

from pathlib import Path

from prefect import flow

from data_contracts.errors import ConfigError, Problem
from data_contracts.reports import AdapterRef, Comparison, EvalTarget, GateReport
from data_contracts.run_spec import RunSpec, StoreSpec
from flows.retrain import data_stages, evaluate, in_store
from flows.stages import Stages
from tasks import registry, stages
from tasks.base import base_identity
from tasks.stores import Store


def recorded_preset(store: StoreSpec, model_uri: str) -> str:
    """The spec file that the version was made with: it is gated on its own data unless another preset is named."""
    return registry.recorded_spec(store, registry.resolve(store, model_uri))


def gate(spec: RunSpec, model_uri: str) -> tuple[GateReport, Comparison | None]:
    """Run the flow with its results kept in the spec's store."""
    decision: tuple[GateReport, Comparison | None] = in_store(gate_flow, spec)(spec, model_uri)
    return decision


@flow(name="gate", result_serializer="json")
def gate_flow(spec: RunSpec, model_uri: str) -> tuple[GateReport, Comparison | None]:
    """Score the version, the untuned base and the champion on the spec's frozen items, and judge."""
    run, store = Stages(), Store(Path(spec.store.root))
    version = registry.resolve(spec.store, model_uri)
    dataset = data_stages(run, spec)
    base = run.run(stages.prepare_base, store, spec.model.base, spec.model.revision, base_identity(spec.model))
    if version.base_digest != base.digest:
        raise ConfigError(
            Problem(
                f"{model_uri} stands on another base than {base.name}", "model.base", act="set model.base to its own"
            )
        )
    adapter = AdapterRef(folder=version.adapter, sha256=version.adapter_sha256)
    rival = registry.rival(spec.store, version.name, adapter, base)
    targets = [EvalTarget(name="base", method="lora")]
    targets += [EvalTarget(name="candidate", method=version.method, adapter=adapter, quantisation=version.quantisation)]
    targets += [rival.target] if rival and rival.target else []
    evaluations = evaluate(run, spec, base, dataset.test, targets)
    comparison = run.run(stages.compare, store, [], evaluations, "candidate", spec.gates)
    report = run.run(stages.gate, comparison, spec.gates, rival.label if rival else None, False)
    return report, comparison
