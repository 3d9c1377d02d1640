"""The MLflow client: connected with time limits, experiments opened, a killed run resumed, files read back."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from data_contracts.errors import Problem, TransientError
from data_contracts.run_spec import StoreSpec
from tasks.runtime.core.files import exclusive
from tasks.runtime.store import Store

if TYPE_CHECKING:
    from mlflow import MlflowClient


KEY_TAG = "tunegate.key"
SPEC_FILE = "spec.yaml"
_LOCK_SECONDS = 120.0
# Advice of MLflow's that is not followed on purpose (served_model.py leaves type hints off).
_HINTS = ".*(Add type hints to the `predict`|Inferred schema contains integer|can be interpreted in multiple ways)"


def connect(store: StoreSpec) -> "MlflowClient":
    """Point MLflow at the store's database, or at the server of `store.mlflow_uri`."""
    import mlflow

    warnings.filterwarnings("ignore", message=_HINTS)
    place = Store.of(store)
    uri = store.mlflow_uri or place.database_uri
    if uri == place.database_uri:
        place.root.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    # Two processes that migrate a new database at the same time break it.
    place.files.mkdir(parents=True, exist_ok=True)
    lock, limit = place.files / "mlflow.lock", f"{_LOCK_SECONDS:.0f} s"
    busy = TransientError(Problem("another process is still opening the database", str(lock), limit, "try again"))
    with exclusive(lock, busy, seconds=_LOCK_SECONDS):
        client = mlflow.MlflowClient()
        client.search_experiments(max_results=1)
    return client


def open_experiment(client: "MlflowClient", store: StoreSpec, name: str) -> str:
    """Make the experiment of a model name the active one, and the first time make it; returns its id."""
    import mlflow

    found = client.get_experiment_by_name(name)
    place = None if store.mlflow_uri else Store.of(store).artifacts.as_uri()
    experiment = str(found.experiment_id if found else client.create_experiment(name, artifact_location=place))
    mlflow.set_experiment(experiment_id=experiment)
    return experiment


def attach_file(store: StoreSpec, run_id: str, file: Path, folder: str | None = None) -> None:
    """Add a file to a run that has ended."""
    connect(store).log_artifact(run_id, str(file), folder)


def kept_files(store: StoreSpec, run_id: str, folder: str | None = None) -> list[str]:
    """Paths of a run's artifacts in a folder of theirs; none if there is no such run or folder."""
    from mlflow.exceptions import MlflowException

    try:
        return [found.path for found in connect(store).list_artifacts(run_id, folder) if not found.is_dir]
    except MlflowException as error:
        if error.get_http_status_code() not in (400, 404):
            raise
        return []


def kept_text(run_id: str, path: str) -> str:
    """A text file among a run's artifacts; `kept_files` says which there are."""
    import mlflow

    return str(mlflow.artifacts.load_text(f"runs:/{run_id}/{path}"))


@contextmanager
def resumed(run_id: str) -> Iterator[None]:
    """Log into a run that has ended."""
    import mlflow

    with mlflow.start_run(run_id=run_id):
        yield
