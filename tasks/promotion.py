"""Move the champion alias: only to a version whose gates passed, or with a reason that is kept; and back."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from filelock import FileLock

from data_contracts.errors import ConfigError, GateError, Problem
from data_contracts.reports import ModelVersion
from data_contracts.run_spec import StoreSpec
from tasks.registry import CHALLENGER, CHAMPION, Registered, alias_version, offer, resolve, version_now
from tasks.stores import Store
from tasks.tracking import connect

if TYPE_CHECKING:
    from mlflow import MlflowClient


Judged = str | None
_WAIT_SECONDS = 60.0


class Standing(NamedTuple):
    """A version under an alias. since: for a champion when it was promoted, for a challenger when it was registered."""

    name: str
    alias: str
    version: str
    verdict: str
    since_unix_seconds: float


def promote_version(
    store: StoreSpec, name: str, version: str | None, override: bool = False, reason: str = "", judged: Judged = None
) -> ModelVersion:
    """Point `champion` at a version (the challenger if none is named) whose gates passed; history keeps the move.

    judged: who its gates compared it with, if that is to be checked: the champion's version, or "none".
    Raises GateError if its gates did not pass, or another version has become champion since they judged, and there is no
    override; ConfigError if there is no such version.
    """
    client = connect(store)
    chosen = version or alias_version(client, name, CHALLENGER)
    if chosen is None:
        raise ConfigError(Problem(f"{name} has no challenger to promote", "promote", act=offer(client, name)))
    found = resolve(store, f"models:/{name}/{chosen}")
    if found.verdict != "pass" and not override:
        act = 'look at its gates with `tunegate compare`, or overrule them: --override --reason "why"'
        raise GateError(Problem(f"the gates of {name} version {chosen} say {found.verdict}", "promote", "pass", act))
    return _move(client, store, found, "promote", reason or f"gates: {found.verdict}", judged)


def rollback_version(store: StoreSpec, name: str) -> ModelVersion:
    """Point `champion` back at the version before the last promotion. Raises ConfigError if there was none."""
    client = connect(store)
    champions = standing(store, name)
    if len(champions) < 2:
        raise ConfigError(Problem(f"{name} has no champion before this one", "rollback", act=offer(client, name)))
    found = resolve(store, f"models:/{name}/{champions[-2]}")
    return _move(client, store, found, "rollback", f"back from version {champions[-1]}")


def standing(store: StoreSpec, name: str) -> list[str]:
    """The versions that became champion, oldest first, without those that were rolled back."""
    champions: list[str] = []
    for entry in _history(store, name):
        champions = champions[:-1] if entry["act"] == "rollback" else [*champions, entry["to"]]
    return champions


def _move(
    client: "MlflowClient", store: StoreSpec, to: Registered, act: str, reason: str, judged: Judged = None
) -> ModelVersion:
    # MLflow has no compare-and-set: between two promoters on one store the lock decides, and the later one sees the first.
    with FileLock(f"{_history_file(store)}.lock", timeout=_WAIT_SECONDS):
        before = alias_version(client, to.name, CHAMPION)
        expected = (to.version, None if judged == "none" else judged)
        if judged and before not in expected and not _is_same(client, to, before):
            what = f"version {before} has become champion since {to.name} version {to.version} was judged"
            limit = f"judged against {'no champion' if judged == 'none' else f'version {judged}'}"
            raise GateError(Problem(what, "promote", limit, "judge it again: run once more, or tunegate gate"))
        if before != to.version:
            client.set_registered_model_alias(to.name, CHAMPION, to.version)
            entry = {"name": to.name, "act": act, "from": before, "to": to.version, "reason": reason}
            with _history_file(store).open("a") as file:
                file.write(json.dumps({**entry, "unix_seconds": time.time()}) + "\n")
    return version_now(store, ModelVersion(name=to.name, version=to.version, aliases=[], run_id=to.run_id))


def _is_same(client: "MlflowClient", to: Registered, version: str | None) -> bool:
    """Whether a version has the very adapter that is to be promoted: a run that was forced registers it once more."""
    tags = client.get_model_version(to.name, version).tags if version else {}
    return tags.get("tunegate.adapter_sha256") == to.adapter_sha256


def _history(store: StoreSpec, name: str) -> list[dict[str, Any]]:
    """Every move of a model's champion alias, oldest first."""
    file = _history_file(store)
    entries = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [entry for entry in entries if entry["name"] == name]


def _history_file(store: StoreSpec) -> Path:
    return Store(Path(store.root)).files / "promotions.jsonl"


def standings(store: StoreSpec) -> list[Standing]:
    """Every model of the registry with its champion and challenger, by name."""
    client = connect(store)
    found: list[Standing] = []
    for model in client.search_registered_models():
        moved = {entry["to"]: float(entry["unix_seconds"]) for entry in _history(store, model.name)}
        for alias in (CHAMPION, CHALLENGER):
            if alias in model.aliases:
                version = client.get_model_version(model.name, model.aliases[alias])
                made = version.creation_timestamp / 1000  # MLflow: milliseconds
                since = moved.get(str(version.version), made) if alias == CHAMPION else made
                verdict = version.tags.get("tunegate.verdict", "")
                found.append(Standing(model.name, alias, str(version.version), verdict, since))
    return sorted(found, key=lambda one: (one.name, one.alias != CHAMPION))
