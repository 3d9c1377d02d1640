"""Move the champion alias, and ask a registered model."""

from prefect import flow

from data_contracts.reports import ModelVersion
from data_contracts.run_spec import StoreSpec
from flows.runs_left import hold
from tasks import promotion, registry


@flow(name="promote", on_running=[hold])
def promote_flow(store: StoreSpec, name: str, version: str | None, override: bool, reason: str) -> ModelVersion:
    return promotion.promote_version(store, name, version, override, reason)


@flow(name="rollback", on_running=[hold])
def rollback_flow(store: StoreSpec, name: str) -> ModelVersion:
    return promotion.rollback_version(store, name)


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
