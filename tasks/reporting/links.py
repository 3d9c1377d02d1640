"""The places of a run's things: files, a registered version, and pages of servers, or None."""

import os
from pathlib import Path
from urllib.parse import urlsplit
from uuid import UUID

from data_contracts.data_reports import DatasetManifest
from data_contracts.reports import ModelVersion
from data_contracts.run_spec import StoreSpec
from tasks.runtime.store import Store

MLFLOW_PAGE = "TUNEGATE_MLFLOW_PAGE"
"""Environment: address of an MLflow page over the store's own database, set by the server's start."""


def data_files(data: DatasetManifest, store: Store) -> dict[str, Path]:
    """The file of everything in a data set, by name."""
    names = ("train", "validation", "test", "quarantine", "duplicate_rows", "contract_result")
    paths = {name.replace("_", " "): getattr(data, name).path for name in names} | {"data docs": data.data_docs}
    return {name: store.files / path for name, path in paths.items()}


def model_uri(model: ModelVersion) -> str:
    """By alias if it is in production, else by number."""
    return f"models:/{model.name}{'@champion' if 'champion' in model.aliases else f'/{model.version}'}"


def prefect_page(flow_run_id: UUID | str) -> str | None:
    """The run's page, where Prefect's server is one that stays: PREFECT_API_URL is set."""
    from prefect.utilities.urls import url_for

    page = url_for("flow-run", flow_run_id)
    return _without_password(page) if page else None


def mlflow_page(store: StoreSpec, run_id: str) -> str | None:
    """The MLflow run's page, where a server is known: `store.mlflow_uri`, or one over the store's database."""
    server = store.mlflow_uri or os.environ.get(MLFLOW_PAGE, "")
    if urlsplit(server).scheme not in ("http", "https"):
        return None
    return f"{_without_password(server).rstrip('/')}/#/runs/{run_id}"


def _without_password(address: str) -> str:
    parts = urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
