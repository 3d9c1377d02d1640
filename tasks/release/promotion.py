"""Move the champion alias: only to a version whose gates passed and that is what was evaluated, or with a reason that is
kept; and back.

A move is planned first (what speaks against it), then checked (tasks/release/release_check.py), then carried out under a lock, if
the champion is still the one that the plan found. MLflow has no compare-and-set: between machines with stores
of their own on one MLflow server the lock does not hold, see docs/release.md.
"""

import getpass
import os
import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefect.runtime import flow_run

from data_contracts.errors import ConfigError, GateError, Problem
from data_contracts.lineage import LINEAGE_TAG
from data_contracts.redaction import without_secrets
from data_contracts.releases import Act, Evidence, Move, Moved
from data_contracts.reports import ModelVersion, ReleaseCheck
from data_contracts.run_spec import StoreSpec
from tasks.release import judgements
from tasks.release import promotion_ledger as ledgers
from tasks.release.history import end_unfinished, kept_champions, moves_done, record_move
from tasks.release.judgements import KeptJudgement
from tasks.release.promotion_ledger import Ledger
from tasks.release.registry import CHALLENGER, CHAMPION, Registered, alias_version, offer, resolve, version_now
from tasks.runtime.mlflow_client import connect
from tasks.runtime.store import Store

if TYPE_CHECKING:
    from mlflow import MlflowClient


NO_CHAMPION = "none"
_MOST_CHARACTERS = 500  # of a reason; a tag of MLflow's holds 5,000


@dataclass(frozen=True)
class Approval:
    """A person's approval of a move. override: move despite objections; requires a reason."""

    override: bool = False
    reason: str = ""

    def check(self, act: Act) -> None:
        """Raises ConfigError for an override without a reason, or a reason that is too long to keep."""
        if self.override and not self.reason.strip():
            raise ConfigError(Problem("--override without --reason", act, act='add --reason "why"'))
        if len(self.reason) > _MOST_CHARACTERS:
            raise ConfigError(Problem(f"a reason of {len(self.reason)} characters", act, f"{_MOST_CHARACTERS}"))


@dataclass(frozen=True)
class MovePlan:
    """A planned move. before: the champion to replace; against: the objections."""

    act: Act
    to: Registered
    before: str | None
    judgement: KeptJudgement | None
    against: tuple[Problem, ...]

    @property
    def is_done(self) -> bool:
        return self.before == self.to.version

    def overruled(self, approval: Approval, also: Sequence[Problem] = ()) -> list[str]:
        """What the approval overrules. Raises GateError if something says no and it is not overruled."""
        approval.check(self.act)
        found = [*self.against, *also]
        if found and not approval.override:
            raise GateError(*found)
        return [without_secrets(problem.what)[:_MOST_CHARACTERS] for problem in found]


# --- plans --------------------------------------------------------------------------------------------------


def plan_promotion(store: StoreSpec, name: str, version: str | None, compared_with: str | None = None) -> MovePlan:
    """To a version, or the challenger if none is named.

    compared_with: the champion's version that its gates compared it with, or NO_CHAMPION; None: it is looked up in what they
    said.
    Raises ConfigError if there is no such version.
    """
    client = connect(store)
    chosen = version or alias_version(client, name, CHALLENGER)
    if chosen is None:
        raise ConfigError(Problem(f"{name} has no challenger to promote", "promote", act=offer(client, name)))
    to, before = resolve(store, f"models:/{name}/{chosen}"), alias_version(client, name, CHAMPION)
    kept = judgements.newest_judgement(store, to)
    against: list[Problem] = []
    if before != to.version:
        against = [*_of_gates(to, kept), *_of_champion(client, to, before, kept, compared_with)]
    return MovePlan("promote", to, before, kept, tuple(against))


def _of_gates(to: Registered, kept: KeptJudgement | None) -> list[Problem]:
    judge = f"judge it: tunegate gate --model models:/{to.name}/{to.version}"
    if kept is None or kept.adapter_sha256 != to.adapter.sha256:
        return [Problem(f"no gate report is kept for {to.label}", "promote", "pass", judge)]
    said = {kept.verdict} if kept.is_later else {kept.verdict, to.verdict}
    if said == {"pass"}:
        return []
    differ = ": its tag and its report differ" if len(said) > 1 else ""
    act = 'look at its gates with `tunegate compare`, or overrule them: --override --reason "why"'
    return [Problem(f"the gates of {to.label} say {' and '.join(sorted(said))}{differ}", "promote", "pass", act)]


def _of_champion(
    client: "MlflowClient", to: Registered, before: str | None, kept: KeptJudgement | None, compared_with: str | None
) -> list[Problem]:
    """The champion must be the one that it was compared with, unless it has the candidate's own adapter."""
    if before is None or kept is None:
        return []
    champion = _adapter(client, to.name, before)
    is_same = compared_with == before if compared_with else kept.champion_sha256 == champion
    if champion == to.adapter.sha256 or is_same:
        return []
    what = f"version {before} has become champion since {to.label} was judged"
    limit = f"judged against {_label(client, to.name, kept.champion_sha256, compared_with)}"
    return [Problem(what, "promote", limit, "judge it again: run once more, or tunegate gate")]


def _label(client: "MlflowClient", name: str, adapter: str | None, compared_with: str | None) -> str:
    if compared_with == NO_CHAMPION or (compared_with is None and adapter is None):
        return "no champion"
    found = client.search_model_versions(f"name = '{name}' and tags.`tunegate.adapter_sha256` = '{adapter}'")
    return f"version {compared_with or (found[0].version if found else 'that is gone')}"


def _adapter(client: "MlflowClient", name: str, version: str) -> str:
    return str(client.get_model_version(name, version).tags.get("tunegate.adapter_sha256", ""))


def plan_rollback(store: StoreSpec, name: str) -> MovePlan:
    """To the champion before this one: the newest that was not rolled back itself and is still registered.

    Raises ConfigError if there is none.
    """
    client = connect(store)
    before = alias_version(client, name, CHAMPION)
    there = {str(found.version) for found in client.search_model_versions(f"name = '{name}'")}
    good = [version for version in kept_champions(moves_done(client, store, name)) if version in there - {before}]
    if not good:
        act = f"promote one: tunegate promote {name} --version N; {offer(client, name)}"
        raise ConfigError(Problem(f"{name} has no champion before this one", "rollback", act=act))
    to = resolve(store, f"models:/{name}/{good[-1]}")
    return MovePlan("rollback", to, before, judgements.newest_judgement(store, to), ())


# --- carried out --------------------------------------------------------------------------------------------


def carry_out(
    store: StoreSpec, plan: MovePlan, check: ReleaseCheck | None, overrode: Sequence[str] = (), reason: str = ""
) -> Moved:
    """Set the alias, if the champion is still the plan's. Raises GateError if the champion changed meanwhile.

    check: None: the version was not checked. The move is in the ledger before the alias is set and with its end after, so a
    kill between any two writes is known.
    """
    client, to = connect(store), plan.to
    with ledgers.opened(Store.of(store)) as ledger:
        end_unfinished(client, ledger)
        now = alias_version(client, to.name, CHAMPION)
        moved = Moved(model=ModelVersion(name=to.name, version=to.version, aliases=[], run_id=to.run_id), move=None)
        if now != to.version:
            if now != plan.before and not (now and _adapter(client, to.name, now) == to.adapter.sha256):
                raise GateError(_too_late(ledger, plan, now))
            move = _move(client, plan, now, check, overrode, reason)
            ledger.write("intended", move)
            client.set_registered_model_alias(to.name, CHAMPION, to.version)
            _verify(client, ledger, move)
            record_move(client, move)
            ledger.write("done", move)
            moved = moved.model_copy(update={"move": move})
    return moved.model_copy(update={"model": version_now(store, moved.model)})


def _too_late(ledger: Ledger, plan: MovePlan, now: str | None) -> Problem:
    by = next((entry.move.who for entry in reversed(ledger.of(plan.to.name)) if entry.move.to == now), "")
    champion = f"version {now} has become champion" if now else "the champion has been taken away"
    what = f"{champion} since {plan.to.label} was judged{f', by {by}' if by else ''}"
    limit = f"{f'version {plan.before}' if plan.before else 'no champion'}, as when this began"
    return Problem(what, plan.act, limit, "judge it again: run once more, or tunegate gate")


def _verify(client: "MlflowClient", ledger: Ledger, move: Move) -> None:
    """On a server that other machines use too, one of them may have set it at the same moment: the last one wins."""
    now = alias_version(client, move.name, CHAMPION)
    if now != move.to:
        ledger.write("undone", move, f"the alias was set to version {now} at the same time, from elsewhere")
        what = f"version {now} became champion at the same time, from another machine"
        raise GateError(Problem(what, move.act, act=f"see who it was: tunegate history {move.name}"))


def _move(
    client: "MlflowClient", plan: MovePlan, before: str | None, check: ReleaseCheck | None, overrode: Sequence[str],
    reason: str,
) -> Move:  # fmt: skip
    to, kept = plan.to, plan.judgement
    known = f"gates: {kept.verdict}" if kept and plan.act == "promote" else f"back from version {before}"
    evidence = Evidence(
        verdict=kept.verdict if kept else None,
        judged_in=kept.file if kept else "",
        judged_sha256=kept.sha256 if kept else None,
        adapter_sha256=to.adapter.sha256,
        lineage_sha256=client.get_model_version(to.name, to.version).tags.get(LINEAGE_TAG),
        mlflow_run_id=to.run_id,
        check=check,
    )
    return Move(
        id=uuid.uuid4().hex[:12], name=to.name, act=plan.act, before=before, to=to.version, who=who(), run=flow_run.name,
        unix_seconds=time.time(), why=without_secrets(reason.strip()) or known, overrode=list(overrode), evidence=evidence,
    )  # fmt: skip


def who() -> str:
    """user@host, led by who started the CI job if it is one."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = f"uid {os.getuid()}"
    person = os.environ.get("GITHUB_ACTOR") or os.environ.get("GITLAB_USER_LOGIN")
    place = f"{user}@{socket.gethostname()}"
    return f"{person} (CI, {place})" if person else place


# --- both at once, for a version that was checked before ----------------------------------------------------


def promote_version(
    store: StoreSpec, name: str, version: str | None, approval: Approval = Approval(), *,
    compared_with: str | None = None, check: ReleaseCheck | None = None,
) -> ModelVersion:  # fmt: skip
    """Point `champion` at a version (the challenger if none is named) whose gates passed; the ledger keeps the move.

    compared_with: as in `plan_promotion`. Raises GateError if its gates did not pass, or another version has become champion
    since they judged, and there is no override; ConfigError if there is no such version.
    """
    plan = plan_promotion(store, name, version, compared_with)
    overrode = plan.overruled(approval, refusals_of(plan, check))
    return carry_out(store, plan, check, overrode, approval.reason).model


def refusals_of(plan: MovePlan, check: ReleaseCheck | None) -> list[Problem]:
    """What a check says against a move."""
    return [Problem(refusal, plan.to.label, act=overrule(plan)) for refusal in (check.refusals if check else [])]


def overrule(plan: MovePlan) -> str:
    """The next act where a move was refused."""
    version = f" --version {plan.to.version}" if plan.act == "promote" else ""
    return f'nothing was moved; to override: tunegate {plan.act} {plan.to.name}{version} --override --reason "why"'
