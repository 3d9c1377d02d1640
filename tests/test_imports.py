"""Arrows point one way: flows -> tasks -> tasks.core -> data_contracts; workers import core and contracts only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"flows", "tasks", "data_contracts"}
HEAVY = {"mlflow", "torch", "transformers", "peft", "bitsandbytes", "lm_eval"}
# folder -> names its modules must not import; the longest matching folder rules
BANNED = {
    "data_contracts": {"flows", "tasks", "prefect", "great_expectations"} | HEAVY,
    "tasks/core": {"flows", "tasks", "prefect", "great_expectations"} | HEAVY,
    "tasks/workers": {"flows", "tasks", "prefect", "mlflow", "great_expectations"},
    "tasks": {"flows", "tasks.workers"} | HEAVY,
    "flows": {"tasks.core", "tasks.workers", "great_expectations"} | HEAVY,
}
# What a folder may import although a wider name is banned.
ALLOWED = {
    "tasks/core": {"tasks.core"},
    "tasks/workers": {"tasks.core", "tasks.workers"},
}
# The only modules that know MLflow.
MLFLOW = {
    "tasks/tracking.py",
    "tasks/register.py",
    "tasks/registry.py",
    "tasks/promotion.py",
    "tasks/workers/served_model.py",
    "tasks/workers/ask_model.py",
}
FILES = [path.relative_to(ROOT) for folder in sorted(OURS) for path in sorted((ROOT / folder).rglob("*.py"))]


def imported_names(source: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: use absolute imports"
            # `from tasks import stores` means tasks.stores; the bare package is no arrow.
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def forbidden(path: Path, source: str) -> list[str]:
    folder = max((folder for folder in BANNED if path.is_relative_to(folder)), key=len)
    banned = BANNED[folder] - ({"mlflow"} if path.as_posix() in MLFLOW else set())
    allowed = ALLOWED.get(folder, set())
    return sorted(name for name in imported_names(source) if within(name, banned) and not within(name, allowed))


def test_there_are_files_to_check():
    assert {path.parts[0] for path in FILES} == OURS
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_one_way(path):
    assert forbidden(path, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("flows/x.py", "from tasks.core.stats import mean"),
        ("flows/x.py", "def f():\n    import torch.nn"),
        ("flows/x.py", "from tasks import workers"),
        ("flows/x.py", "import mlflow"),
        ("tasks/x.py", "from tasks.workers.device import Device"),
        ("tasks/x.py", "from mlflow.tracking import MlflowClient"),
        ("tasks/core/x.py", "from tasks.stores import Store"),
        ("tasks/core/x.py", "from tasks import stores"),
        ("tasks/workers/x.py", "import tasks.stores"),
        ("tasks/workers/x.py", "import prefect"),
        ("data_contracts/x.py", "from flows.cli import main"),
    ],
)
def test_an_import_against_the_arrows_is_caught(path, source):
    assert forbidden(Path(path), source)


def test_the_modules_that_may_import_mlflow_are_the_ones_that_do():
    users = {
        path.as_posix()
        for path in FILES
        if any(within(name, {"mlflow"}) for name in imported_names((ROOT / path).read_text(encoding="utf-8")))
    }
    assert users <= MLFLOW
