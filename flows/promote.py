"""Move the champion alias, show its history, and ask a registered model."""

import sys
from pathlib import Path

from prefect import flow
from ruamel.yaml import YAML

from data_contracts.errors import Problem, TunegateError
from data_contracts.releases import History, Moved
from data_contracts.reports import ReleaseCheck
from data_contracts.run_spec import StoreSpec
from flows.services.crashed_runs import hold
from tasks.pipeline import notifications as notify
from tasks.release import promotion, registry
from tasks.release.history import promotion_history, rebuild_ledger, reconcile
from tasks.release.promotion import Approval, MovePlan
from tasks.release.registry import Registered
from tasks.release.release_check import ReleaseLimits, check_release
from tasks.runtime.console import note, page


@flow(name="promote", on_running=[hold])
def promote_flow(store: StoreSpec, name: str, version: str | None, override: bool, reason: str) -> Moved:
    """Objections are collected before a model is loaded, and the model is checked before anything is moved."""
    _reconcile(store)
    return _carry_out(store, promotion.plan_promotion(store, name, version), Approval(override, reason))


@flow(name="rollback", on_running=[hold])
def rollback_flow(store: StoreSpec, name: str, override: bool = False, reason: str = "") -> Moved:
    _reconcile(store)
    return _carry_out(store, promotion.plan_rollback(store, name), Approval(override, reason))


def _reconcile(store: StoreSpec) -> None:
    for line in reconcile(store):
        note(line)


def _carry_out(store: StoreSpec, plan: MovePlan, approval: Approval) -> Moved:
    plan.overruled(approval)
    if plan.is_done:
        return promotion.carry_out(store, plan, check=None)
    check, problems = _checked(store, plan, approval)
    found = promotion.carry_out(store, plan, check, plan.overruled(approval, problems), approval.reason)
    notify.champion_moved(store, found)
    return found


def _checked(store: StoreSpec, plan: MovePlan, approval: Approval) -> tuple[ReleaseCheck | None, list[Problem]]:
    """The check, and what it says against the move. One that cannot be made is an error, unless it is overruled too."""
    kept, to = plan.judgement, plan.to
    answers, precision = (kept.answers, kept.precision) if kept else ([], None)
    try:
        check, _ = check_release(store, to, answers, precision, _limits(store, to))
    except TunegateError as error:
        what = f"could not be checked: {error.problems[0].what.splitlines()[0]}"
        problem = Problem(what, to.label, act=promotion.overrule(plan))
        if not approval.override:
            raise type(error)(*error.problems, problem) from error
        return None, [problem]
    return check, promotion.refusals_of(plan, check)


def _limits(store: StoreSpec, version: Registered) -> ReleaseLimits:
    """As the run that made the version had them."""
    spec = YAML(typ="safe", pure=True).load(Path(registry.recorded_spec_file(store, version)))
    gates = spec["gates"]
    return ReleaseLimits(spec["evaluate"]["sample_tokens"], gates.get("max_ms_per_token"), gates.get("max_memory_gb"))


def promote(store: StoreSpec, name: str, version: str | None, override: bool, reason: str) -> Moved:
    """Make a version the champion. Raises GateError if something speaks against it and there is no override."""
    return promote_flow(store, name, version, override, reason)


def rollback(store: StoreSpec, name: str, override: bool = False, reason: str = "") -> Moved:
    """Make the champion before this one the champion again."""
    return rollback_flow(store, name, override, reason)


def read_history(store: StoreSpec, name: str, *, rebuild: bool) -> History:
    """Every move of a model's champion. rebuild: first replace a ledger that was changed by one from the registry."""
    with page(sys.stderr).status("asking the registry"):
        if rebuild:
            note(rebuild_ledger(store))
        return promotion_history(store, name)


def ask_registered(store: StoreSpec, model_uri: str, question: str, max_new_tokens: int) -> str:
    """One answer of a registered model."""
    registry.resolve(store, model_uri)
    (answer,) = registry.ask_version(store, model_uri, [question], max_new_tokens)
    return answer
