"""Set what Prefect, MLflow and Hugging Face read from the environment, before any of them is imported.

Everything they keep lands in the store, so one folder holds a run and HOME stays clean. Nothing reports home.
A value that is set already wins: your server, your cache.
"""

import os
from pathlib import Path

from data_contracts.errors import ConfigError, Problem, StoreError
from data_contracts.run_spec import StoreSpec
from flows.services.servers import HOST
from flows.services.state import open_here
from tasks.reporting.links import MLFLOW_PAGE
from tasks.runtime.store import Store


def prepare_environment(store: StoreSpec) -> None:
    """Set defaults for this process and its children. If `tunegate up` runs in this store, its Prefect server is used
    and its MLflow page is linked."""
    files = Store.of(store).files.resolve()
    state = open_here(store)
    services = f"http://{HOST}:{state.prefect_port}/api" if state else None
    yours = os.environ.get("PREFECT_API_URL") not in (None, services)
    if services:
        os.environ.setdefault("PREFECT_API_URL", services)
    if state and state.mlflow_port:
        os.environ.setdefault(MLFLOW_PAGE, f"http://{HOST}:{state.mlflow_port}")
    for name, value in (_QUIET | _homes(files)).items():
        if name == "PREFECT_HOME" and yours:
            continue  # your server comes with your own profile
        os.environ.setdefault(name, value)
    for name in ("NO_PROXY", "no_proxy"):
        # A proxy must not be asked for a page of this machine.
        os.environ[name] = ",".join(dict.fromkeys([*filter(None, os.environ.get(name, "").split(",")), *_LOOPBACK]))


def make_homes(store: StoreSpec) -> None:
    """Make the store's folders. Prefect would only warn that it cannot make its own below one that is missing."""
    try:
        (Store.of(store).files / "prefect").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        act = "give a folder you may write to: --set store.root=DIR"
        raise StoreError(Problem(f"cannot be made: {error.strerror}", store.root, act=act)) from error


def require_store(store: StoreSpec) -> None:
    """Raise ConfigError if nothing was ever kept there: most likely a typo in the path."""
    if not store.mlflow_uri and not Store.of(store).files.is_dir():
        act = "name the folder a run was kept in: --set store.root=DIR"
        raise ConfigError(Problem("there is no store here", str(Path(store.root).resolve()), act=act))


_LOOPBACK = ("127.0.0.1", "localhost")
_QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # In memory, as by default, a server that restarts forgets who holds a slot and never gives it out again.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    # The default of 20 s fails on a fresh database when the cores are busy.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    # Prefect's pages get its log; the terminal gets ours.
    "PREFECT_LOGGING_LEVEL": "INFO",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # A request waits for a server for one minute, not four: a stage is retried automatically (docs/failures.md).
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "GX_ANALYTICS_ENABLED": "false",
}


def _homes(files: Path) -> dict[str, str]:
    """Where each library keeps what it would put under HOME."""
    cache = files / "cache"
    return {
        "PREFECT_HOME": str(files / "prefect"),
        # Results outlive the server they were made under: a run resumes from them.
        "PREFECT_LOCAL_STORAGE_PATH": str(files / "prefect" / "results"),
        # The hub's own cache stays where it is: other projects share its models.
        "HF_DATASETS_CACHE": str(cache / "datasets"),
        "HF_EVALUATE_CACHE": str(cache / "evaluate"),
        "HF_MODULES_CACHE": str(cache / "modules"),
        "MPLCONFIGDIR": str(cache / "matplotlib"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "torchinductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
    }
