"""The documentation is true: the reference is the code's, and every path, module, command, link and word in a page is right.

Run: pytest tests/project/test_docs.py
"""

import ast
import re
import shlex
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from typer.main import get_command

from data_contracts.retry_table import KINDS
from docs.generate_reference import FOLDER, pages
from flows.cli.app import app

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
REFERENCE = pages()
OUTSIDE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md")]
PAGES = [*OUTSIDE, *sorted(DOCS.rglob("*.md"))]
# The log says what was true on its day; reference pages are checked against the code as a whole.
TODAY = [page for page in PAGES if page != DOCS / "log.md" and page.parent != FOLDER]
WRITTEN = [page for page in PAGES if page.parent != FOLDER]
FOLDERS = "flows|tasks|data_contracts|tests|infra|docs|benchmarks"
# Files of users and of other programs.
NOT_OURS = {"rules.py", "convert_hf_to_gguf.py", "infra/.env"}
WORDS = re.compile(
    r"\b(told|tells?|dials?|dialled|afresh|said aloud|whoever|what becomes of|besides?|goes on|lies|by itself)\b",
    re.IGNORECASE,
)


def names(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


# --- reference ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFERENCE)
def test_a_page_of_the_reference_is_what_the_code_says(name):
    assert text_of(FOLDER / name) == REFERENCE[name], "run: python docs/generate_reference.py"


def test_the_reference_has_no_other_pages():
    assert {page.name for page in FOLDER.iterdir()} == set(REFERENCE)


# --- what a page names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", TODAY, ids=names(TODAY))
def test_every_path_in_a_page_exists(page):
    text = text_of(page)
    found = re.findall(rf"(?<![\w/.:-])((?:{FOLDERS}|\.github|\.ci)/[\w.*/-]*[\w*/])", text)
    patterns = {path.replace("SUBJECT", "*").rstrip("/") for path in found} - NOT_OURS
    assert [pattern for pattern in sorted(patterns) if not any(ROOT.glob(pattern))] == []


@pytest.mark.parametrize("page", TODAY, ids=names(TODAY))
def test_every_module_in_a_page_exists(page):
    found = re.findall(rf"(?<![\w/.-])((?:{FOLDERS})(?:\.\w+)+)", text_of(page))
    assert [name for name in found if not is_module_or_part(name)] == []


@pytest.mark.parametrize("page", TODAY, ids=names(TODAY))
def test_every_file_named_without_its_folder_exists(page):
    found = set(re.findall(r"(?<![\w/.-])(\w+\.py)\b(?!/)", text_of(page))) - NOT_OURS
    assert [name for name in sorted(found) if not any(any((ROOT / f).rglob(name)) for f in FOLDERS.split("|"))] == []


def is_module_or_part(name: str) -> bool:
    """A package, a module, a name defined in one, or a file of ours with its suffix."""
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:size])
        if (file := path.with_suffix(".py")).exists():
            rest = parts[size:]
            return not rest or rest == ["py"] or rest[0] in defined_in(file)
        if path.is_dir():
            return size == len(parts)
    return False


def defined_in(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.parse(text_of(file)).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


COMMAND_PAGES = [page for page in TODAY if page.parent == DOCS / "tutorial" or page in OUTSIDE]


@pytest.mark.parametrize("page", COMMAND_PAGES, ids=names(COMMAND_PAGES))
def test_every_command_in_a_page_parses(page):
    fenced = "\n".join(re.findall(r"```[a-z]*\n(.*?)```", text_of(page), re.DOTALL))
    lines = [line.strip().removeprefix("$ ") for line in fenced.splitlines()]
    commands = get_command(app).commands
    for args in (shlex.split(line, comments=True)[1:] for line in lines if line.startswith("tunegate ")):
        commands[args[0]].make_context(args[0], args[1:], resilient_parsing=False)
    makefile = text_of(ROOT / "Makefile")
    targets = [line.split()[1] for line in lines if re.match(r"make [a-z]", line)]
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


# --- links and the site -------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_every_link_and_picture_leads_to_a_file(page):
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text_of(page)) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    # The site holds docs/ only.
    inside = [link for link in links if DOCS in page.parents and DOCS not in (page.parent / link).resolve().parents]
    assert inside == []


def test_the_navigation_names_every_page_once():
    site = YAML(typ="safe").load(ROOT / "mkdocs.yml")
    named = sorted(_leaves(site["nav"]))
    assert named == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


def _leaves(nav: object) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    items = nav.values() if isinstance(nav, dict) else nav
    return [leaf for item in items for leaf in _leaves(item)]


# --- words and size -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", WRITTEN, ids=names(WRITTEN))
def test_a_page_is_in_plain_words(page):
    # What a program prints has the program's words: its tests look at them. So has the table of docs/failures.md.
    text = re.sub(r"```.*?```|<!-- example -->.*?<!-- end -->", "", text_of(page), flags=re.DOTALL)
    of_code = {kind.act for kind in KINDS} | {kind.seen for kind in KINDS}
    lines = [line for line in text.splitlines() if not any(words in line for words in of_code)]
    if page.name == "CONTRIBUTING.md":
        lines = [line for line in lines if not line.startswith("|")]  # its word table
    assert [line for line in lines if WORDS.search(line)] == []


def test_the_first_pages_stay_short():
    assert len(text_of(ROOT / "README.md").splitlines()) <= 150
    assert len(text_of(ROOT / "AGENTS.md").splitlines()) <= 30
    tree = text_of(ROOT / "README.md").partition("## Where things are")[2].split("```")[1]
    assert 10 < len(tree.strip().splitlines()) <= 30
