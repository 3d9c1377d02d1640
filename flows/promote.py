"""Move the champion alias, tell every move there was, and ask a registered model."""

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
from tasks.release import history as moves
from tasks.release import promotion, registry
from tasks.release.promotion import Plan
from tasks.release.registry import Registered
from tasks.release.release_check import Limits, check_release
from tasks.runtime.console import note, page


@flow(name="promote", on_running=[hold])
def promote_flow(store: StoreSpec, name: str, version: str | None, override: bool, reason: str) -> Moved:
    """What speaks against it is found before a model is loaded, and the model is checked before anything is moved."""
    _reconcile(store)
    return _carry_out(store, promotion.plan_promotion(store, name, version), override, reason)


@flow(name="rollback", on_running=[hold])
def rollback_flow(store: StoreSpec, name: str, override: bool = False, reason: str = "") -> Moved:
    _reconcile(store)
    return _carry_out(store, promotion.plan_rollback(store, name), override, reason)


def _reconcile(store: StoreSpec) -> None:
    for told in moves.reconcile(store):
        note(told)


def _carry_out(store: StoreSpec, plan: Plan, override: bool, reason: str) -> Moved:
    plan.allow(override, reason)
    if plan.is_done:
        return promotion.carry_out(store, plan, None)
    check, problems = _checked(store, plan, override)
    found = promotion.carry_out(store, plan, check, plan.allow(override, reason, problems), reason)
    notify.champion_moved(store, found)
    return found


def _checked(store: StoreSpec, plan: Plan, override: bool) -> tuple[ReleaseCheck | None, list[Problem]]:
    """The check, and what it says against the move. One that cannot be made is an error, unless it is overruled too."""
    judged, to = plan.judged, plan.to
    answers, precision = (judged.answers, judged.precision) if judged else ([], None)
    try:
        check, _ = check_release(store, to, answers, precision, _limits(store, to))
    except TunegateError as error:
        what = f"could not be checked: {error.problems[0].what.splitlines()[0]}"
        problem = Problem(what, to.label, act=promotion.overrule(plan))
        if not override:
            raise type(error)(*error.problems, problem) from error
        return None, [problem]
    return check, promotion.problems_of(plan, check)


def _limits(store: StoreSpec, version: Registered) -> Limits:
    """As the run that made the version had them."""
    spec = YAML(typ="safe", pure=True).load(Path(registry.recorded_spec(store, version)))
    gates = spec["gates"]
    return Limits(spec["evaluate"]["sample_tokens"], gates.get("max_ms_per_token"), gates.get("max_memory_gb"))


def promote(store: StoreSpec, name: str, version: str | None, override: bool, reason: str) -> Moved:
    """Make a version the champion. Raises GateError if something speaks against it and there is no override."""
    found: Moved = promote_flow(store, name, version, override, reason)
    return found


def rollback(store: StoreSpec, name: str, override: bool = False, reason: str = "") -> Moved:
    """Make the champion before this one the champion again."""
    found: Moved = rollback_flow(store, name, override, reason)
    return found


def history(store: StoreSpec, name: str, rebuild: bool) -> History:
    """Every move of a model's champion. rebuild: write a ledger that was changed anew from the registry first."""
    with page(sys.stderr).status("asking the registry"):
        if rebuild:
            note(moves.rebuild(store))
        return moves.history(store, name)


def ask(store: StoreSpec, model_uri: str, question: str, max_new_tokens: int) -> str:
    """One answer of a registered model."""
    registry.resolve(store, model_uri)
    (answer,) = registry.ask_version(store, model_uri, [question], max_new_tokens)
    return answer
