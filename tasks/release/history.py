"""Every move of a champion: as the store's ledger has it, and as the registry has it in tags that other machines see too."""

import time
from typing import TYPE_CHECKING, NamedTuple

from data_contracts.errors import ConfigError, Problem, StoreError
from data_contracts.releases import JUDGED_TAG, MOVE_TAG, OVERRIDE_TAG, Entry, History, Move
from data_contracts.run_spec import StoreSpec
from tasks.release import promotion_ledger as ledgers
from tasks.release.promotion_ledger import Ledger
from tasks.release.registry import CHALLENGER, CHAMPION, alias_version, offer
from tasks.runtime.mlflow_client import connect
from tasks.runtime.store import Store

if TYPE_CHECKING:
    from mlflow import MlflowClient


class Standing(NamedTuple):
    """A version under an alias. since: for a champion when it was promoted, for a challenger when it was registered.
    override: why it is champion although something said no."""

    name: str
    alias: str
    version: str
    verdict: str
    since_unix_seconds: float
    override: str


# --- what the registry keeps --------------------------------------------------------------------------------


def record(client: "MlflowClient", move: Move) -> None:
    """Keep the move as a tag of its model, and on the version whether somebody overruled what spoke against it."""
    client.set_registered_model_tag(move.name, _tag(move), move.model_dump_json())
    tags = client.get_model_version(move.name, move.to).tags
    if move.overrode:
        client.set_model_version_tag(move.name, move.to, OVERRIDE_TAG, move.why)
    elif OVERRIDE_TAG in tags and move.act == "promote":
        client.delete_model_version_tag(move.name, move.to, OVERRIDE_TAG)


def _tag(move: Move) -> str:
    return f"{MOVE_TAG}{int(move.unix_seconds * 1000)}.{move.id}"


def registry_moves(client: "MlflowClient", name: str) -> list[Move]:
    """What the tags say, oldest first; nothing if there is no such model."""
    models = client.search_registered_models(f"name = '{name}'")
    tags = models[0].tags if models else {}
    moves = [Move.model_validate_json(text) for key, text in tags.items() if key.startswith(MOVE_TAG)]
    return sorted(moves, key=lambda move: move.unix_seconds)


def entries_of(client: "MlflowClient", ledger: Ledger, name: str) -> list[Entry]:
    """Every move, oldest first: as the registry has it, and if it has not, because it was never made, as the ledger has."""
    own = {entry.move.id: entry for entry in ledger.of(name)}
    done = {
        move.id: Entry(
            move=move, step="done", note=own[move.id].note if move.id in own else "", elsewhere=move.id not in own
        )
        for move in registry_moves(client, name)
    }
    return sorted((own | done).values(), key=lambda entry: entry.move.unix_seconds)


# --- what follows from them ---------------------------------------------------------------------------------


def moves_done(client: "MlflowClient", store: StoreSpec, name: str) -> list[Move]:
    entries = entries_of(client, ledgers.read(place_of(store)), name)
    return [entry.move for entry in entries if entry.step == "done"]


def standing(store: StoreSpec, name: str) -> list[str]:
    """The versions that became champion, oldest first, without those that were rolled back."""
    return champions(moves_done(connect(store), store, name))


def champions(moves: list[Move]) -> list[str]:
    """Of these moves; a version that was rolled back from stays out until it is promoted again."""
    found: list[str] = []
    for move in moves:
        if move.act == "promote":
            found.append(move.to)
        else:
            found = [version for version in found if version != move.before]
    return found


def standings(store: StoreSpec) -> list[Standing]:
    """Every model of the registry with its champion and challenger, by name."""
    client = connect(store)
    found: list[Standing] = []
    for model in client.search_registered_models():
        moved = {move.to: move.unix_seconds for move in moves_done(client, store, model.name)}
        for alias in (CHAMPION, CHALLENGER):
            if alias in model.aliases:
                version = client.get_model_version(model.name, model.aliases[alias])
                made = version.creation_timestamp / 1000  # MLflow: milliseconds
                since = moved.get(str(version.version), made) if alias == CHAMPION else made
                verdict = version.tags.get(JUDGED_TAG) or version.tags.get("tunegate.verdict", "")
                override = version.tags.get(OVERRIDE_TAG, "") if alias == CHAMPION else ""
                found.append(Standing(model.name, alias, str(version.version), verdict, since, override))
    return sorted(found, key=lambda one: (one.name, one.alias != CHAMPION))


# --- what a killed process left -----------------------------------------------------------------------------


def reconcile(store: StoreSpec, wait_seconds: float = 60.0) -> list[str]:
    """End every move that a killed process left, by what the alias says now; what was done about each."""
    if not ledgers.read(place_of(store)).unfinished:
        return []
    with ledgers.opened(place_of(store), wait_seconds) as ledger:
        return end_unfinished(connect(store), ledger)


def end_unfinished(client: "MlflowClient", ledger: Ledger) -> list[str]:
    """For whoever holds the ledger: nobody is in the middle of a move then."""
    return [_end(client, ledger, move) for move in ledger.unfinished]


def _end(client: "MlflowClient", ledger: Ledger, move: Move) -> str:
    now = alias_version(client, move.name, CHAMPION)
    what = f"the {'promotion' if move.act == 'promote' else 'rollback'} of {move.name} to version {move.to} was cut off"
    if now == move.to:
        told = f"{what} after the alias was set: it is complete now"
        record(client, move)
        ledger.write("done", move, told)
    else:
        champion = f"version {now}" if now else "none"
        told = f"{what} before the alias was set: the champion is {champion}, nothing was moved"
        ledger.write("undone", move, told)
    return told


# --- the whole story ----------------------------------------------------------------------------------------


def history(store: StoreSpec, name: str) -> History:
    """Every move of a model, and whether the ledger, the registry and the alias agree. Raises ConfigError if there is no
    such model."""
    client = connect(store)
    ledger = ledgers.read(place_of(store))
    reconciled = [] if ledger.problem else reconcile(store)
    ledger = ledgers.read(place_of(store))
    entries, champion = entries_of(client, ledger, name), alias_version(client, name, CHAMPION)
    if not entries and not client.search_registered_models(f"name = '{name}'"):
        raise ConfigError(Problem(f"the registry has no {name}", "history", act=offer(client, name)))
    problems = [str(ledgers.broken(ledger))] if ledger.problem else []
    if not ledger.problem:
        problems += [str(ledgers.broken(ledger, what)) for what in _differences(store, ledger, entries)]
    done = [entry.move for entry in entries if entry.step == "done"]
    if done and done[-1].to != champion:
        what = (
            f"the champion is {f'version {champion}' if champion else 'none'}, and the last move was to {done[-1].to}"
        )
        problems.append(str(Problem(what, name, act="somebody set the alias past Tunegate: promote or roll back")))
    return History(name=name, champion=champion, entries=entries, reconciled=reconciled, problems=problems)


def _differences(store: StoreSpec, ledger: Ledger, entries: list[Entry]) -> list[str]:
    """Where the ledger is not what the registry has; moves that only the registry has are another machine's, on a server."""
    lost = sum(entry.elsewhere for entry in entries)
    own = ledger.entries
    changed = [entry.move for entry in entries if entry.move.id in own and own[entry.move.id].move != entry.move]
    told = [f"the registry has another story of the {move.act} to version {move.to}" for move in changed]
    return told if store.mlflow_uri or not lost else [*told, f"it lacks {lost} moves that the registry has"]


def rebuild(store: StoreSpec) -> str:
    """Write a ledger that was changed anew, from what the registry knows; where the changed one lies."""
    client = connect(store)
    with ledgers.locked(place_of(store)):
        ledger = ledgers.read(place_of(store))
        names = {model.name for model in client.search_registered_models()} | {
            entry.move.name for entry in ledger.entries.values()
        }
        entries = [entry for name in names for entry in entries_of(client, ledger, name)]
        ordered = sorted(entries, key=lambda entry: entry.move.unix_seconds)
        told = f"rebuilt at {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}"
        aside = ledgers.rewrite(place_of(store), ordered, told)
    if ledgers.read(place_of(store)).problem:
        raise StoreError(ledgers.broken(ledgers.read(place_of(store))))
    return f"{len(ordered)} moves written anew; {f'the old file is {aside}' if aside else 'there was no file'}"


def place_of(store: StoreSpec) -> Store:
    return Store.of(store)
