"""Build instruction rows from the docstrings of the installed Python, or of any installed packages.

Writes `rows.jsonl` (messages and their
source) in an order that depends on content alone; the report names the Python version. Source files are parsed, not
imported; only C functions of a list of harmless standard modules are looked at through `inspect`.
"""

import contextlib
import hashlib
import importlib
import inspect
import io
import itertools
import json
import os
import platform
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NamedTuple

from data_contracts.errors import DataError, Problem
from data_contracts.jobs.data import PythonDocsJob
from tasks.data.ingestion.core.docstrings import MAX_SOURCE_CHARS, explanation, functions
from tasks.runtime.workers.harness import main

_STDLIB = "the Python standard library"
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "__pycache__", "turtledemo", "_bundled", "_vendor"}
# No look-up rows from these: importing them opens a browser or a window, or they are programs and leftovers that
# nobody looks up.
_NOT_LOOKED_UP = {"antigravity", "this", "tkinter", "turtle", "idlelib", "test", "lib2to3", "distutils", "ensurepip"}


class Doc(NamedTuple):
    """One row before it is written. `key` orders rows by content."""

    kind: str  # lookup or summary
    package: str  # top-level name, the unit of the cap
    question: str
    answer: str

    @property
    def key(self) -> str:
        return hashlib.sha256(f"{self.question}\0{self.answer}".encode()).hexdigest()


class Module(NamedTuple):
    name: str
    path: Path
    where: str  # how a question names the library


def build(job: PythonDocsJob, out: Path) -> dict[str, Any]:
    modules = find_modules(job.packages)
    lookups = {doc.question: doc for doc in sorted(_lookups(modules, "stdlib" in job.packages), key=_by_hash)}
    summaries = _distinct(sorted(_summaries(modules), key=_by_hash))
    most = job.max_rows_per_package
    lookup_rows = _capped(sorted(lookups.values(), key=_by_hash), most)[: job.max_lookup_rows]
    # Shortest first: a small budget buys many short sources instead of a few long ones.
    summary_rows = sorted(_capped(summaries, most), key=lambda doc: (len(doc.question), doc.key))
    rows = sorted([*lookup_rows, *summary_rows[: job.max_summary_rows]], key=_by_hash)
    with (out / "rows.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(_row(doc), ensure_ascii=False) + "\n" for doc in rows)
    return {
        "python": platform.python_version(),
        "packages": job.packages,
        "rows": dict(sorted(Counter(doc.kind for doc in rows).items())),
    }


def find_modules(packages: list[str]) -> list[Module]:
    """Source files of every package. Raises DataError naming all packages that cannot be found."""
    found: dict[str, Module] = {}
    problems: list[Problem] = []
    for package in packages:
        modules = list(_stdlib_modules() if package == "stdlib" else _package_modules(package))
        found.update((module.name, module) for module in modules)
        if not modules:
            act = f"install it next to Tunegate ({sys.prefix}), or run from the folder that holds it"
            problems.append(Problem("no such importable package, or none with Python sources", package, act=act))
    if problems:
        raise DataError(*problems)
    return sorted(found.values())


def _stdlib_modules() -> Iterator[Module]:
    yield from _modules(Path(sysconfig.get_path("stdlib")), "", _STDLIB)


def _package_modules(package: str) -> Iterator[Module]:
    """A package or a single module; a dotted name narrows it to a part. Nothing is imported."""
    top, *parts = package.split(".")
    spec = PathFinder.find_spec(top)
    where = _STDLIB if top in sys.stdlib_module_names else f"the Python package `{top}`"
    for root in (spec.submodule_search_locations or []) if spec else []:
        part = Path(root, *parts)
        yield from (
            _modules(part, f"{package}.", where) if part.is_dir() else _single(part.with_suffix(".py"), package, where)
        )
    if spec and spec.origin and not spec.submodule_search_locations and not parts:
        yield from _single(Path(spec.origin), package, where)


def _single(path: Path, name: str, where: str) -> Iterator[Module]:
    if path.suffix == ".py" and path.is_file():
        yield Module(name, path, where)


def _modules(root: Path, prefix: str, where: str) -> Iterator[Module]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS and name.isidentifier())
        for file in sorted(files):
            path = Path(folder, file)
            name = prefix + ".".join(path.relative_to(root).with_suffix("").parts)
            if path.suffix == ".py":
                yield Module(name.removesuffix("__init__").rstrip("."), path, where)


def _read(module: Module) -> Iterator[tuple[str, str, str, bool]]:
    """(qualified name, source, docstring, stub) of a module; a file Python cannot parse has none."""
    try:
        source = module.path.read_text(encoding="utf-8")
        for function in functions(source):
            yield f"{module.name}.{function.name}", function.source, function.doc, function.stub
    except (SyntaxError, UnicodeDecodeError, RecursionError):
        return


def _public(name: str) -> bool:
    return not any(part.startswith("_") for part in name.split("."))


def _lookups(modules: list[Module], with_stdlib: bool) -> Iterator[Doc]:
    named = ((module.where, name, doc) for module in modules for name, _, doc, _ in _read(module))
    c_named = ((_STDLIB, name, doc) for name, doc in _c_functions()) if with_stdlib else ()
    for where, name, doc in itertools.chain(named, c_named):
        package = name.partition(".")[0]
        if _public(name) and package not in _NOT_LOOKED_UP and (answer := explanation(doc)):
            yield Doc("lookup", package, f"In {where}, what does `{name}` do?", answer)


def _summaries(modules: list[Module]) -> Iterator[Doc]:
    for module in modules:
        for _, source, doc, stub in _read(module):
            answer = None if stub or len(source) > MAX_SOURCE_CHARS else explanation(doc)
            if answer:
                question = f"Summarise what this Python function does.\n\n```python\n{source}\n```"
                yield Doc("summary", module.name.partition(".")[0], question, answer)


def _c_functions() -> Iterator[tuple[str, str]]:
    """Name and docstring of every public C function and method that a harmless standard module shows.

    The same object under several names counts once, under the shortest: `os.getcwd`, not `posix.getcwd`.
    """
    names: dict[int, tuple[int, str, Any]] = {}
    for module in sorted(name for name in sys.stdlib_module_names if _public(name) and name not in _NOT_LOOKED_UP):
        for name, member in _c_members(module):
            kept = names.get(id(member))
            if kept is None or (len(name), name) < kept[:2]:
                names[id(member)] = (len(name), name, member)
    for _, name, member in names.values():
        if isinstance(doc := member.__doc__, str) and doc:
            yield name, doc


def _c_members(module_name: str) -> Iterator[tuple[str, Any]]:
    silent = io.StringIO()
    with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
        try:
            module = importlib.import_module(module_name)
        except ImportError:  # not on this platform: winreg, msvcrt
            return
    for name, member in vars(module).items():
        if inspect.isbuiltin(member) and _public(name):
            yield f"{module_name}.{name}", member
        elif inspect.isclass(member) and _public(name) and not inspect.isfunction(member.__init__):
            methods = ((key, value) for key, value in vars(member).items() if inspect.ismethoddescriptor(value))
            yield from ((f"{module_name}.{name}.{key}", value) for key, value in methods if _public(key))


def _by_hash(doc: Doc) -> str:
    return doc.key


def _distinct(docs: Iterable[Doc]) -> list[Doc]:
    """The first of rows with the same source or the same summary: the others would teach nothing new."""
    seen: set[str] = set()
    kept = []
    for doc in docs:
        if doc.question not in seen and doc.answer not in seen:
            seen.update((doc.question, doc.answer))
            kept.append(doc)
    return kept


def _capped(docs: Iterable[Doc], most: int) -> list[Doc]:
    """At most `most` rows a package, in the order given."""
    counts: Counter[str] = Counter()
    kept = []
    for doc in docs:
        counts[doc.package] += 1
        if counts[doc.package] <= most:
            kept.append(doc)
    return kept


def _row(doc: Doc) -> dict[str, Any]:
    turns = [{"role": "user", "content": doc.question}, {"role": "assistant", "content": doc.answer}]
    return {"messages": turns, "source": f"python-docs/{doc.kind}"}


if __name__ == "__main__":
    main(build, PythonDocsJob)
