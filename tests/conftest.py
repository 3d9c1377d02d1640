"""Shared pieces: the tiny base, rows for it, and one real run of the whole chain.

Not covered here, and why: CUDA, bf16 and NF4 kernels on a GPU (none at hand), the model hub online, container images
and a cluster (no engine at hand). The `gpu` tests skip without a CUDA device and fail there if REQUIRE_GPU=1 and none
is found.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_contracts.jobs.models import InitAdapterJob, LoraStart, PrepareBaseJob

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # Started in the background: what tests start would inherit that, and no Ctrl-C would reach it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
# As on a user's machine: Python keeps what it has compiled.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
os.environ["COLUMNS"] = "120"  # tables break lines alike in every terminal
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # files run side by side: a second thread would spin on a busy core


@pytest.fixture(scope="session")
def prefect(tmp_path_factory) -> Iterator[str]:
    """One real Prefect server for every test that runs a flow in this process; its address."""
    from prefect import settings
    from prefect.testing.utilities import prefect_test_harness

    quiet = {
        settings.PREFECT_HOME: tmp_path_factory.mktemp("prefect"),
        settings.PREFECT_SERVER_ANALYTICS_ENABLED: False,
        settings.PREFECT_LOGGING_LEVEL: "CRITICAL",
        settings.PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,  # ending its thread takes each flow a second
    }
    with settings.temporary_settings(quiet), prefect_test_harness(server_startup_timeout=120):
        yield str(settings.PREFECT_API_URL.value())


def step0_job(base: Path, **changes) -> InitAdapterJob:
    """What makes a plain LoRA adapter of rank 4, but for the changes."""
    settings = {
        "seed": 5, "rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear", "use_rslora": False,
        "use_dora": False, "init": "default",
    }  # fmt: skip
    return InitAdapterJob(base=base, settings=LoraStart(**settings | changes))


def toy_rows(count: int, first: int = 0) -> list[dict]:
    """Rows whose answer follows from the question."""
    return [
        {
            "row_id": f"{i:064x}",
            "source": "toy",
            "line": i + 1,
            "messages": [
                {"role": "user", "content": f"What comes after {i}?"},
                {"role": "assistant", "content": f"After {i} comes {i + 1}, of course."},
            ],
        }
        for i in range(first, first + count)
    ]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """A random two-layer Llama over bytes, as `builtin:tiny-llama` gives it."""
    from tasks.models.workers.prepare_base import prepare

    job = PrepareBaseJob(base="builtin:tiny-llama", revision=None)
    return Path(prepare(job, tmp_path_factory.mktemp("base"))["path"])


@pytest.fixture
def copy_of_code(tmp_path, monkeypatch) -> Iterator[Path]:
    """A copy of our code, which is read where the code that a stage uses is digested."""
    from tasks.runtime import fingerprint

    for package in ("flows", "tasks", "data_contracts"):
        source = Path(__file__).parents[1] / package
        shutil.copytree(source, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(fingerprint, "_ROOT", tmp_path)
    fingerprint.read_module.cache_clear()
    yield tmp_path
    fingerprint.read_module.cache_clear()
