"""The promotion history of a model: as the store's ledger has it, and as the registry has it in tags that other machines see too.

`promotion_history`, `champions` and `past_champions` are queries: they change no byte of the ledger or the registry, and report a
move that a killed process left as unfinished. `reconcile` ends such moves, for the flows that act: retrain, promote, rollback.
"""

import time
from typing import TYPE_CHECKING, NamedTuple

from data_contracts.errors import ConfigError, Problem, StoreError
from data_contracts.releases import JUDGED_TAG, MOVE_TAG, OVERRIDE_TAG, History, Move, MoveEntry
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


class Champions(NamedTuple):
    """Every champion and challenger of a registry, and in words every move that a killed process left."""

    standings: list[Standing]
    unfinished: list[str]


# --- what the registry keeps --------------------------------------------------------------------------------


def record_move(client: "MlflowClient", move: Move) -> None:
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


def entries_of(client: "MlflowClient", ledger: Ledger, name: str) -> list[MoveEntry]:
    """Every move, oldest first: as the registry has it, and if it has not, because it was never made, as the ledger has."""
    own = {entry.move.id: entry for entry in ledger.of(name)}
    done = {
        move.id: MoveEntry(
            move=move, step="done", note=own[move.id].note if move.id in own else "", elsewhere=move.id not in own
        )
        for move in registry_moves(client, name)
    }
    return sorted((own | done).values(), key=lambda entry: entry.move.unix_seconds)


# --- what follows from them ---------------------------------------------------------------------------------


def moves_done(client: "MlflowClient", store: StoreSpec, name: str) -> list[Move]:
    """Of one model, oldest first."""
    entries = entries_of(client, ledgers.read(Store.of(store)), name)
    return [entry.move for entry in entries if entry.step == "done"]


def past_champions(store: StoreSpec, name: str) -> list[str]:
    """The versions that became champion, oldest first, without those that were rolled back."""
    return kept_champions(moves_done(connect(store), store, name))


def kept_champions(moves: list[Move]) -> list[str]:
    """Of these moves; a version that was rolled back from stays out until it is promoted again."""
    found: list[str] = []
    for move in moves:
        if move.act == "promote":
            found.append(move.to)
        else:
            found = [version for version in found if version != move.before]
    return found


def champions(store: StoreSpec) -> Champions:
    """The standings of every model, and every unfinished move of this store."""
    ledger = ledgers.read(Store.of(store))
    return Champions(standings(store), [unfinished_line(move) for move in ledger.unfinished])


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


# --- moves that a killed process left -----------------------------------------------------------------------


def unfinished_line(move: Move) -> str:
    """For a person: a move that is being made this moment, or was cut off."""
    return f"{_described(move)} is unfinished: the next promote, rollback or retrain ends it"


def _described(move: Move) -> str:
    return f"the {'promotion' if move.act == 'promote' else 'rollback'} of {move.name} to version {move.to}"


def reconcile(store: StoreSpec, wait_seconds: float = 60.0) -> list[str]:
    """End every move that a killed process left, by where the alias points now; what was done about each."""
    if not ledgers.read(Store.of(store)).unfinished:
        return []
    with ledgers.opened(Store.of(store), wait_seconds) as ledger:
        return end_unfinished(connect(store), ledger)


def end_unfinished(client: "MlflowClient", ledger: Ledger) -> list[str]:
    """Only for the process that holds the ledger: nobody is in the middle of a move then."""
    return [_end(client, ledger, move) for move in ledger.unfinished]


def _end(client: "MlflowClient", ledger: Ledger, move: Move) -> str:
    now = alias_version(client, move.name, CHAMPION)
    if now == move.to:
        line = f"{_described(move)} was cut off after the alias was set: it is complete now"
        record_move(client, move)
        ledger.write("done", move, line)
    else:
        champion = f"version {now}" if now else "none"
        line = f"{_described(move)} was cut off before the alias was set: the champion is {champion}, nothing was moved"
        ledger.write("undone", move, line)
    return line


# --- all of it ----------------------------------------------------------------------------------------------


def promotion_history(store: StoreSpec, name: str) -> History:
    """Every move of a model, and whether the ledger, the registry and the alias agree. Raises ConfigError if there is no
    such model."""
    client = connect(store)
    ledger = ledgers.read(Store.of(store))
    entries, champion = entries_of(client, ledger, name), alias_version(client, name, CHAMPION)
    if not entries and not client.search_registered_models(f"name = '{name}'"):
        raise ConfigError(Problem(f"the registry has no {name}", "history", act=offer(client, name)))
    return History(
        name=name,
        champion=champion,
        entries=entries,
        unfinished=[unfinished_line(entry.move) for entry in entries if entry.step == "intended"],
        problems=[*_of_ledger(store, ledger, entries), *_of_alias(name, entries, champion)],
    )


def _of_ledger(store: StoreSpec, ledger: Ledger, entries: list[MoveEntry]) -> list[str]:
    """Where the ledger is not what was written, or not what the registry has."""
    if ledger.problem:
        return [str(ledgers.broken(ledger))]
    return [str(ledgers.broken(ledger, what)) for what in _differences(store, ledger, entries)]


def _of_alias(name: str, entries: list[MoveEntry], champion: str | None) -> list[str]:
    """An alias that is not where the last move, finished or not, has put it."""
    done = [entry.move.to for entry in entries if entry.step == "done"]
    set_by_unfinished = {entry.move.to for entry in entries if entry.step == "intended"}
    if not done or done[-1] == champion or champion in set_by_unfinished:
        return []
    what = f"the champion is {f'version {champion}' if champion else 'none'}, and the last move was to {done[-1]}"
    return [str(Problem(what, name, act="the alias was set outside Tunegate: promote or roll back"))]


def _differences(store: StoreSpec, ledger: Ledger, entries: list[MoveEntry]) -> list[str]:
    """Where the ledger is not what the registry has; moves that only the registry has are another machine's, on a server."""
    lost = sum(entry.elsewhere for entry in entries)
    own = ledger.entries
    changed = [entry.move for entry in entries if entry.move.id in own and own[entry.move.id].move != entry.move]
    lines = [f"the registry has another record of the {move.act} to version {move.to}" for move in changed]
    return lines if store.mlflow_uri or not lost else [*lines, f"it lacks {lost} moves that the registry has"]


def rebuild_ledger(store: StoreSpec) -> str:
    """Replace a ledger that was changed by a new one from what the registry knows; where the changed one is kept."""
    client, place = connect(store), Store.of(store)
    with ledgers.locked(place):
        ledger = ledgers.read(place)
        names = {model.name for model in client.search_registered_models()} | {
            entry.move.name for entry in ledger.entries.values()
        }
        entries = [entry for name in names for entry in entries_of(client, ledger, name)]
        ordered = sorted(entries, key=lambda entry: entry.move.unix_seconds)
        note = f"rebuilt at {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}"
        kept = ledgers.rewrite(place, ordered, note)
    if ledgers.read(place).problem:
        raise StoreError(ledgers.broken(ledgers.read(place)))
    return f"{len(ordered)} moves were written again; {f'the old file is {kept}' if kept else 'there was no file'}"
