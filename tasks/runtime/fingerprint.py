"""What a stage's result depends on, besides its settings and inputs: the code that shapes it, and library versions.

A module counts by its syntax tree without docstrings, comments and annotations. Imports are followed, but not into code
that shapes no result, so that a corrected help text or a new table costs nobody a training.
"""

import ast
import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_OURS = ("tasks", "data_contracts", "flows")
# Followed by no import. A stage whose result such a module does shape names it, as it names its own (tasks/pipeline/policies.py).
_SHAPES_NO_RESULT = (
    "data_contracts",  # specs: a stage's settings are in its key by value; reports: fields, which the code that fills them shows
    "flows",
    "tasks.pipeline",
    "tasks.reporting",
    "tasks.runtime",  # where files are stored, how a process starts, what the console shows
    "tasks.training.plan",
    "tasks.training.core",  # the memory formulas: a plan is compared with what was measured
    "tasks.training.workers.planned_memory",
    "tasks.training.workers.describe_base",
    "tasks.models.integrity",  # checks: they refuse a file, and change none
    "tasks.models.core.adapter_scan",
)
# But these in it do.
_SHAPES_RESULTS = ("data_contracts.jobs", "tasks.runtime.workers.device", "tasks.runtime.workers.ranks")
_MESSAGES = frozenset({"Problem", "note", "say", "warn"})
"""Calls that only report: what they say is left out."""


def code_digest(modules: tuple[str, ...]) -> str:
    """Hex sha256 over the named modules and everything of ours that they import, directly or not, and that shapes results."""
    lines = (f"{name} {digest}" for name, digest in sorted(code_digests(modules).items()))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def code_digests(modules: tuple[str, ...]) -> dict[str, str]:
    """The same module by module. A name with a slash is a file, such as a template, and counts by its bytes."""
    found: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if "/" in name:
            found[name] = hashlib.sha256(_ROOT.joinpath(name).read_bytes()).hexdigest()
            continue
        file = _file(name)
        if name in found or file is None:
            continue
        found[name], imported = read_module(file)
        waiting += filter(_shapes_results, imported)
    return found


@cache
def read_module(file: Path) -> tuple[str, list[str]]:
    """Digest of a module, and what it imports. Once in a process: what runs is the code of its start."""
    tree = _Bare().visit(ast.parse(file.read_text(encoding="utf-8")))
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), _imports(tree)


def library_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Installed versions by distribution name."""
    return {name: version(name) for name in names}


class _Bare(ast.NodeTransformer):
    """Leaves what shapes results: no docstrings (of settings, too), annotations, imports for annotations, messages."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if text else self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST | None:
        typing_only = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        return None if typing_only else self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if isinstance(node.func, ast.Name) and node.func.id in _MESSAGES:
            node.args, node.keywords = [], []
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)  # a field stays a field
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)


def _shapes_results(module: str) -> bool:
    return _within(module, _SHAPES_RESULTS) or not _within(module, _SHAPES_NO_RESULT)


def _within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _file(module: str) -> Path | None:
    if module.partition(".")[0] not in _OURS:
        return None
    place = _ROOT.joinpath(*module.split("."))
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.exists()), None)


def _imports(tree: ast.Module) -> list[str]:
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names
