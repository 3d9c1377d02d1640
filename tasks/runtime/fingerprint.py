"""What a stage's result depends on, besides its inputs: our code that it uses, and library versions."""

import ast
import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_OURS = ("tasks", "data_contracts", "flows")
# What a failure is called, and whether it is tried again, shapes no result.
_WITHOUT_RESULT = frozenset({"data_contracts.errors", "data_contracts.failures"})


def code_digest(modules: tuple[str, ...]) -> str:
    """Hex sha256 over the named modules and everything of ours that they import, directly or not."""
    lines = (f"{name} {digest}" for name, digest in sorted(code_digests(modules).items()))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def code_digests(modules: tuple[str, ...]) -> dict[str, str]:
    """The same module by module. Taken over the syntax tree, so a comment or a blank line changes nothing."""
    found: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        file = _file(name)
        if name in found or name in _WITHOUT_RESULT or file is None:
            continue
        found[name], imported = read_module(file)
        waiting += imported
    return found


@cache
def read_module(file: Path) -> tuple[str, list[str]]:
    """Digest of a module, and what it imports. Once in a process: what runs is the code of its start."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), _imports(tree)


def library_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Installed versions by distribution name."""
    return {name: version(name) for name in names}


def _file(module: str) -> Path | None:
    if module.partition(".")[0] not in _OURS:
        return None
    base = _ROOT.joinpath(*module.split("."))
    return next((file for file in (base.with_suffix(".py"), base / "__init__.py") if file.exists()), None)


def _imports(tree: ast.Module) -> list[str]:
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names
