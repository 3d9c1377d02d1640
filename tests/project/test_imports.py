"""Arrows point one way. The layer is a path segment: any `core` is pure, any `workers` is a child process."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("data_contracts", "flows", "tasks")
HEAVY = {"mlflow", "torch", "transformers", "peft", "bitsandbytes", "lm_eval"}
# layer -> libraries that its modules must not import
BANNED = {
    "contracts": {"prefect", "great_expectations"} | HEAVY,
    "core": {"prefect", "great_expectations"} | HEAVY,
    "workers": {"prefect", "mlflow", "great_expectations"},
    "steps": HEAVY,
    "flows": {"great_expectations"} | HEAVY,
}
# layer -> our layers that its modules may import
ALLOWED = {
    "contracts": {"contracts"},
    "core": {"core", "contracts"},
    "workers": {"workers", "core", "contracts"},
    "steps": {"steps", "core", "contracts"},
    "flows": {"flows", "steps", "contracts"},
}
# The subjects of tasks/, lowest first: each imports only itself and what is below it.
FLOORS = (
    {"runtime"},
    {"models", "data", "reporting"},
    {"evaluation", "release"},
    {"training", "export", "serving"},
    {"reproduction"},
    {"pipeline"},
)
# The only modules that know MLflow.
MLFLOW = {
    "tasks/runtime/mlflow_client.py",
    "tasks/reporting/mlflow_run.py",
    "tasks/release/register.py",
    "tasks/release/registry.py",
    "tasks/release/history.py",
    "tasks/release/promotion.py",
    "tasks/release/workers/served_model.py",
    "tasks/release/workers/ask_model.py",
}
FILES = [path.relative_to(ROOT) for folder in OURS for path in sorted((ROOT / folder).rglob("*.py"))]


def layer_of(name: str) -> str:
    """The layer of one of our modules, named with dots."""
    top, *inner = name.split(".")
    if top == "tasks":
        return next((part for part in ("core", "workers") if part in inner), "steps")
    return {"data_contracts": "contracts", "flows": "flows"}[top]


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts)


def imported_names(source: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: use absolute imports"
            # `from tasks.runtime import store` means tasks.runtime.store; the bare package is no arrow.
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def forbidden(path: Path, source: str) -> list[str]:
    layer = layer_of(module_name(path))
    banned = BANNED[layer] - ({"mlflow"} if path.as_posix() in MLFLOW else set())
    return sorted(
        name
        for name in imported_names(source)
        if (layer_of(name) not in ALLOWED[layer] if name.split(".")[0] in OURS else name.split(".")[0] in banned)
    )


def floor_of(subject: str) -> int:
    return next(number for number, subjects in enumerate(FLOORS) if subject in subjects)


def upward(path: Path, source: str) -> list[str]:
    """What a module of tasks/ imports of a subject that is next to or above its own."""
    if path.parts[0] != "tasks" or len(path.parts) < 3:
        return []
    own = path.parts[1]
    ours = [name for name in imported_names(source) if name.startswith("tasks.")]
    return [name for name in ours if (other := name.split(".")[1]) != own and floor_of(other) >= floor_of(own)]


def test_there_are_files_to_check():
    assert {path.parts[0] for path in FILES} == set(OURS)
    assert {layer_of(module_name(path)) for path in FILES} == set(ALLOWED)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_one_way(path):
    assert forbidden(path, (ROOT / path).read_text(encoding="utf-8")) == []


def test_every_subject_has_its_floor():
    subjects = {path.parts[1] for path in FILES if path.parts[0] == "tasks" and len(path.parts) > 2}
    assert subjects == set().union(*FLOORS)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_subject_imports_only_those_below_it(path):
    assert upward(path, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("tasks/runtime/x.py", "from tasks.models.integrity import checked_base"),
        ("tasks/models/core/x.py", "from tasks.training.core import memory"),
        ("tasks/release/x.py", "from tasks.evaluation.core.stats import mean"),
    ],
)
def test_an_arrow_upward_or_sideways_is_caught(path, source):
    assert upward(Path(path), source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("flows/x.py", "from tasks.evaluation.core.stats import mean"),
        ("flows/x.py", "def f():\n    import torch.nn"),
        ("flows/x.py", "from tasks.runtime import workers"),
        ("flows/x.py", "import mlflow"),
        ("tasks/training/x.py", "from tasks.runtime.workers.device import Device"),
        ("tasks/release/x.py", "from mlflow.tracking import MlflowClient"),
        ("tasks/evaluation/core/x.py", "from tasks.runtime.store import Store"),
        ("tasks/evaluation/core/x.py", "from tasks.runtime import store"),
        ("tasks/models/workers/x.py", "import tasks.runtime.store"),
        ("tasks/models/workers/x.py", "import prefect"),
        ("data_contracts/x.py", "from flows.cli.app import main"),
    ],
)
def test_an_import_against_the_arrows_is_caught(path, source):
    assert forbidden(Path(path), source)


def test_the_modules_that_may_import_mlflow_are_the_ones_that_do():
    users = {
        path.as_posix()
        for path in FILES
        if any(name.split(".")[0] == "mlflow" for name in imported_names((ROOT / path).read_text(encoding="utf-8")))
    }
    assert users <= MLFLOW
