"""Move the champion alias, and ask a registered model."""

from prefect import flow

from data_contracts.reports import ModelVersion
from data_contracts.run_spec import StoreSpec
from flows.runs_left import hold
from tasks import notify, promotion, registry
from tasks.tracking import connect


@flow(name="promote", on_running=[hold])
def promote_flow(store: StoreSpec, name: str, version: str | None, override: bool, reason: str) -> ModelVersion:
    before = registry.alias_version(connect(store), name, registry.CHAMPION)
    found = promotion.promote_version(store, name, version, override, reason)
    notify.champion_moved(store, found, before, "promotion", reason)
    return found


@flow(name="rollback", on_running=[hold])
def rollback_flow(store: StoreSpec, name: str) -> ModelVersion:
    before = registry.alias_version(connect(store), name, registry.CHAMPION)
    found = promotion.rollback_version(store, name)
    notify.champion_moved(store, found, before, "rollback")
    return found


def promote(store: StoreSpec, name: str, version: str | None, override: bool, reason: str) -> ModelVersion:
    """Make a version the champion. Raises GateError if its gates did not pass and there is no override."""
    found: ModelVersion = promote_flow(store, name, version, override, reason)
    return found


def rollback(store: StoreSpec, name: str) -> ModelVersion:
    """Make the champion before this one the champion again."""
    found: ModelVersion = rollback_flow(store, name)
    return found


def ask(store: StoreSpec, model_uri: str, question: str, max_new_tokens: int) -> str:
    """One answer of a registered model."""
    registry.resolve(store, model_uri)
    (answer,) = registry.ask_version(store, model_uri, [question], max_new_tokens)
    return answer
