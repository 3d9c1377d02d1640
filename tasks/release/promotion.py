"""Move the champion alias: only to a version whose gates passed and that is what was evaluated, or with a reason that is
kept; and back.

A move is planned first (what speaks against it), then checked (tasks/release/release_check.py), then carried out under a lock that
sees whether the champion is still the one that the plan found. MLflow has no compare-and-set: between machines with stores
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
from data_contracts.failures import without_secrets
from data_contracts.lineage import LINEAGE_TAG
from data_contracts.releases import Act, Evidence, Move, Moved
from data_contracts.reports import ModelVersion, ReleaseCheck
from data_contracts.run_spec import StoreSpec
from tasks.release import judgements
from tasks.release import promotion_ledger as ledgers
from tasks.release.history import champions, end_unfinished, moves_done, place_of, record
from tasks.release.judgements import Judged
from tasks.release.promotion_ledger import Ledger
from tasks.release.registry import CHALLENGER, CHAMPION, Registered, alias_version, offer, resolve, version_now
from tasks.runtime.mlflow_client import connect

if TYPE_CHECKING:
    from mlflow import MlflowClient

_MOST_CHARACTERS = 500  # of a reason; a tag of MLflow's holds 5,000


@dataclass(frozen=True)
class Plan:
    """A move that nobody has made yet. before: the champion that it takes over from; against: what says no."""

    act: Act
    to: Registered
    before: str | None
    judged: Judged | None
    against: tuple[Problem, ...]

    @property
    def is_done(self) -> bool:
        return self.before == self.to.version

    def allow(self, override: bool, reason: str, also: Sequence[Problem] = ()) -> list[str]:
        """What was overruled. Raises GateError for what says no, unless it is overruled with a reason."""
        if override and not reason.strip():
            raise ConfigError(Problem("--override without --reason", self.act, act='add --reason "why"'))
        if len(reason) > _MOST_CHARACTERS:
            raise ConfigError(Problem(f"a reason of {len(reason)} characters", self.act, f"{_MOST_CHARACTERS}"))
        found = [*self.against, *also]
        if found and not override:
            raise GateError(*found)
        return [without_secrets(problem.what)[:_MOST_CHARACTERS] for problem in found]


# --- plans --------------------------------------------------------------------------------------------------


def plan_promotion(store: StoreSpec, name: str, version: str | None, rival: str | None = None) -> Plan:
    """To a version, or the challenger if none is named.

    rival: the champion's version that its gates compared it with, or "none"; else that is looked up in what they said.
    Raises ConfigError if there is no such version.
    """
    client = connect(store)
    chosen = version or alias_version(client, name, CHALLENGER)
    if chosen is None:
        raise ConfigError(Problem(f"{name} has no challenger to promote", "promote", act=offer(client, name)))
    to, before = resolve(store, f"models:/{name}/{chosen}"), alias_version(client, name, CHAMPION)
    judged = judgements.newest(store, to)
    against = [*_of_gates(to, judged), *_of_rival(client, to, before, judged, rival)] if before != to.version else []
    return Plan("promote", to, before, judged, tuple(against))


def _of_gates(to: Registered, judged: Judged | None) -> list[Problem]:
    judge = f"judge it: tunegate gate --model models:/{to.name}/{to.version}"
    if judged is None or judged.adapter_sha256 != to.adapter_sha256:
        return [Problem(f"no gate report is kept for {to.label}", "promote", "pass", judge)]
    said = {judged.verdict} if judged.is_later else {judged.verdict, to.verdict}
    if said == {"pass"}:
        return []
    differ = ": its tag and its report differ" if len(said) > 1 else ""
    act = 'look at its gates with `tunegate compare`, or overrule them: --override --reason "why"'
    return [Problem(f"the gates of {to.label} say {' and '.join(sorted(said))}{differ}", "promote", "pass", act)]


def _of_rival(
    client: "MlflowClient", to: Registered, before: str | None, judged: Judged | None, rival: str | None
) -> list[Problem]:
    """The champion must be the one that it stood against; the candidate's own adapter is no rival."""
    if before is None or judged is None:
        return []
    champion = _adapter(client, to.name, before)
    if champion == to.adapter_sha256 or (rival == before if rival else judged.rival == champion):
        return []
    what = f"version {before} has become champion since {to.label} was judged"
    limit = f"judged against {_told(client, to.name, judged.rival, rival)}"
    return [Problem(what, "promote", limit, "judge it again: run once more, or tunegate gate")]


def _told(client: "MlflowClient", name: str, adapter: str | None, rival: str | None) -> str:
    if rival == "none" or (rival is None and adapter is None):
        return "no champion"
    found = client.search_model_versions(f"name = '{name}' and tags.`tunegate.adapter_sha256` = '{adapter}'")
    return f"version {rival or (found[0].version if found else 'that is gone')}"


def _adapter(client: "MlflowClient", name: str, version: str) -> str:
    return str(client.get_model_version(name, version).tags.get("tunegate.adapter_sha256", ""))


def plan_rollback(store: StoreSpec, name: str) -> Plan:
    """To the champion before this one: the newest that was not rolled back itself and is still registered.

    Raises ConfigError if there is none.
    """
    client = connect(store)
    before = alias_version(client, name, CHAMPION)
    there = {str(found.version) for found in client.search_model_versions(f"name = '{name}'")}
    good = [version for version in champions(moves_done(client, store, name)) if version in there - {before}]
    if not good:
        act = f"promote one: tunegate promote {name} --version N; {offer(client, name)}"
        raise ConfigError(Problem(f"{name} has no champion before this one", "rollback", act=act))
    to = resolve(store, f"models:/{name}/{good[-1]}")
    return Plan("rollback", to, before, judgements.newest(store, to), ())


# --- carried out --------------------------------------------------------------------------------------------


def carry_out(
    store: StoreSpec, plan: Plan, check: ReleaseCheck | None, overrode: Sequence[str] = (), reason: str = ""
) -> Moved:
    """Set the alias, if the champion is still the plan's. Raises GateError if somebody else was faster.

    The move is in the ledger before the alias is set and with its end after, so a kill between any two writes is known.
    """
    client, to = connect(store), plan.to
    with ledgers.opened(place_of(store)) as ledger:
        end_unfinished(client, ledger)
        now = alias_version(client, to.name, CHAMPION)
        moved = Moved(model=ModelVersion(name=to.name, version=to.version, aliases=[], run_id=to.run_id), move=None)
        if now != to.version:
            if now != plan.before and not (now and _adapter(client, to.name, now) == to.adapter_sha256):
                raise GateError(_too_late(ledger, plan, now))
            move = _move(client, plan, now, check, overrode, reason)
            ledger.write("intended", move)
            client.set_registered_model_alias(to.name, CHAMPION, to.version)
            _verify(client, ledger, move)
            record(client, move)
            ledger.write("done", move)
            moved = moved.model_copy(update={"move": move})
    return moved.model_copy(update={"model": version_now(store, moved.model)})


def _too_late(ledger: Ledger, plan: Plan, now: str | None) -> Problem:
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
        raise GateError(Problem(what, move.act, act=f"look who it was: tunegate history {move.name}"))


def _move(
    client: "MlflowClient", plan: Plan, before: str | None, check: ReleaseCheck | None, overrode: Sequence[str],
    reason: str,
) -> Move:  # fmt: skip
    to, judged = plan.to, plan.judged
    known = f"gates: {judged.verdict}" if judged and plan.act == "promote" else f"back from version {before}"
    evidence = Evidence(
        verdict=judged.verdict if judged else None,
        judged_in=judged.file if judged else "",
        judged_sha256=judged.sha256 if judged else None,
        adapter_sha256=to.adapter_sha256,
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
    store: StoreSpec, name: str, version: str | None, override: bool = False, reason: str = "",
    judged: str | None = None, check: ReleaseCheck | None = None,
) -> ModelVersion:  # fmt: skip
    """Point `champion` at a version (the challenger if none is named) whose gates passed; the ledger keeps the move.

    judged: the champion's version that its gates compared it with, or "none". Raises GateError if its gates did not pass, or
    another version has become champion since they judged, and there is no override; ConfigError if there is no such version.
    """
    plan = plan_promotion(store, name, version, judged)
    overrode = plan.allow(override, reason, problems_of(plan, check))
    return carry_out(store, plan, check, overrode, reason).model


def rollback_version(store: StoreSpec, name: str) -> ModelVersion:
    """Point `champion` back at the version before. Raises ConfigError if there was none."""
    return carry_out(store, plan_rollback(store, name), None).model


def problems_of(plan: Plan, check: ReleaseCheck | None) -> list[Problem]:
    """What a check says against a move."""
    return [Problem(told, plan.to.label, act=overrule(plan)) for told in (check.refusals if check else [])]


def overrule(plan: Plan) -> str:
    """The next act where a move was refused."""
    version = f" --version {plan.to.version}" if plan.act == "promote" else ""
    return f'nothing was moved; all the same: tunegate {plan.act} {plan.to.name}{version} --override --reason "why"'
