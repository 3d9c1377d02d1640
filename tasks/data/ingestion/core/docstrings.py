"""Python source text becomes (name, source without docstring, first paragraph) triples, and poor ones are left out.

Pure: source is parsed with ast, never imported. The limits are those measured in the project's study of Python 3.11's
standard library, where they leave about a third of all functions that have a docstring.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Final, NamedTuple

MIN_WORDS: Final = 4
MAX_WORDS: Final = 60
MAX_SOURCE_CHARS: Final = 2400
_MIN_LETTERS: Final = 0.6  # below, a paragraph is a table, a signature or line art

# Paragraphs that point elsewhere or speak to maintainers explain nothing.
_NOTE: Final = re.compile(
    r"(see|like|same as|similar to|internal|private|deprecated|undocumented|obsolete|todo|xxx|fixme|not implemented"
    r"|override|overridden|helper for|helper function|this is an internal|use \w+ instead)\b",
    re.IGNORECASE,
)
_SIGNATURE: Final = re.compile(r"[\w.]+\s*\(.*\)\s*((->|--|=|:).*)?")
_EMAIL: Final = re.compile(r"[\w.+-]+@[\w-]+\.\w+")


class Function(NamedTuple):
    """A documented function or method."""

    name: str  # dotted, below its module
    source: str  # dedented, without the docstring
    doc: str
    stub: bool  # nothing is left to describe once the docstring is gone


def explanation(doc: str) -> str | None:
    """The docstring's first paragraph as one line, or None if it does not explain anything.

    A leading signature, as C functions have it, is passed over.
    """
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", inspect.cleandoc(doc).strip())]
    if len(paragraphs) > 1 and _SIGNATURE.fullmatch(paragraphs[0]):
        paragraphs = paragraphs[1:]
    text = paragraphs[0]
    words = len(text.split())
    poor = (
        not MIN_WORDS <= words <= MAX_WORDS
        or text.endswith(":")
        or text.startswith(">>>")
        or "->" in text
        or _NOTE.match(text)
        or _SIGNATURE.fullmatch(text)
        or _EMAIL.search(text)
        or sum(char.isalpha() or char == " " for char in text) < _MIN_LETTERS * len(text)
    )
    return None if poor else text


def functions(source: str) -> Iterator[Function]:
    """Every documented function and method of a module, outermost first. Raises SyntaxError."""
    lines = source.splitlines()
    pending: list[tuple[str, ast.AST]] = [("", ast.parse(source))]
    while pending:
        prefix, parent = pending.pop()
        for node in ast.iter_child_nodes(parent):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                pending += [(prefix, node)] if isinstance(node, ast.If | ast.Try) else []
                continue
            name = f"{prefix}{node.name}"
            if isinstance(node, ast.ClassDef):
                pending.append((f"{name}.", node))
                continue
            # Nobody can look up a function inside a function: the underscore makes it private.
            pending.append((f"{name}._locals.", node))
            if doc := ast.get_docstring(node, clean=False):
                yield _function(name, node, doc, lines)


def _function(name: str, node: ast.FunctionDef | ast.AsyncFunctionDef, doc: str, lines: list[str]) -> Function:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    note = node.body[0]
    kept = lines[first - 1 : note.lineno - 1] + lines[note.end_lineno or note.lineno : node.end_lineno]
    # A docstring on the line of its `def` would take the signature with it.
    stub = note.lineno == node.lineno or all(_says_nothing(statement) for statement in node.body[1:])
    return Function(name, textwrap.dedent("\n".join(kept)).strip(), doc, stub)


def _says_nothing(statement: ast.stmt) -> bool:
    """`pass`, `...`, `raise NotImplementedError` and the like."""
    if isinstance(statement, ast.Raise):
        return statement.exc is not None and "NotImplemented" in ast.dump(statement.exc)
    return isinstance(statement, ast.Pass) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )
