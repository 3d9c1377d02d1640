"""The champion as the baseline that a candidate must not be worse than."""

import time
from contextlib import suppress
from dataclasses import dataclass

from data_contracts.errors import ConfigError
from data_contracts.reports import AdapterRef, BaseModelRef, EvalTarget
from data_contracts.run_spec import StoreSpec
from tasks.release.history import past_champions
from tasks.release.registry import CHAMPION, Registered, alias_version, champion, resolve
from tasks.runtime.mlflow_client import connect


@dataclass(frozen=True)
class ChampionBaseline:
    """The version that a candidate must not be worse than. target is None if it has a different base model."""

    label: str  # also says whether objections were overridden
    version: str
    adapter_sha256: str
    target: EvalTarget | None


def champion_baseline(
    store: StoreSpec, name: str, candidate: AdapterRef, base: BaseModelRef
) -> ChampionBaseline | None:
    """The champion, or if that is the candidate itself the one it took over from; None if there was none.

    So the same run again is judged as it was before, though what it made is champion by now. A champion with a different
    base model cannot be scored on this one: its numbers are then missing, and its gate fails.
    """
    found = champion(store, name)
    if found is not None and found.adapter.sha256 == candidate.sha256:
        found = _before(store, name, candidate.sha256)
    return None if found is None else as_baseline(found, base.digest)


def _before(store: StoreSpec, name: str, adapter_sha256: str) -> Registered | None:
    """The newest earlier champion with another adapter that is still registered."""
    for version in reversed(past_champions(store, name)):
        with suppress(ConfigError):
            found = resolve(store, f"models:/{name}/{version}")
            if found.adapter.sha256 != adapter_sha256:
                return found
    return None


def as_baseline(found: Registered, base_digest: str) -> ChampionBaseline:
    """A version as what a candidate on that base must not be worse than."""
    target = EvalTarget(name="champion", method=found.method, adapter=found.adapter, quantisation=found.quantisation)
    label = f"{found.label} (champion by override)" if found.override else found.label
    fits = found.base_digest == base_digest
    return ChampionBaseline(label, found.version, found.adapter.sha256, target if fits else None)


def champion_days(store: StoreSpec, name: str) -> float | None:
    """Days since the champion was registered, or None."""
    client = connect(store)
    version = alias_version(client, name, CHAMPION)
    if version is None:
        return None
    made: float = client.get_model_version(name, version).creation_timestamp / 1000  # MLflow: milliseconds
    return (time.time() - made) / 86_400
