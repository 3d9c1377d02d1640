"""Documentation of installed packages becomes instruction rows, the same ones in the same order each time."""

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_contracts.data_spec import DataSpec
from data_contracts.errors import DataError
from data_contracts.jobs.data import PythonDocsJob
from tasks.data.ingestion.core.docstrings import explanation, functions
from tasks.data.ingestion.ingest import ingest_sources
from tasks.runtime.store import Store

PACKAGES = ["json", "shutil"]


def build(out: Path, **settings: Any) -> list[dict[str, Any]]:
    """Run the builder as the project does: as a child process."""
    defaults = {"packages": PACKAGES, "max_lookup_rows": None, "max_summary_rows": None, "max_rows_per_package": 400}
    job = PythonDocsJob(**(defaults | settings))
    out.mkdir()
    (out / "spec.json").write_text(job.model_dump_json())
    command = [sys.executable, "-m", "tasks.data.ingestion.workers.build_python_docs", str(out / "spec.json"), str(out)]
    subprocess.run(command, check=True, capture_output=True)
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return build(tmp_path_factory.mktemp("docs") / "out")


def of_kind(rows: list[dict[str, Any]], kind: str) -> list[tuple[str, str]]:
    return [
        (row["messages"][0]["content"], row["messages"][1]["content"])
        for row in rows
        if row["source"] == f"python-docs/{kind}"
    ]


def test_look_up_rows_ask_what_a_public_function_does(rows: list[dict[str, Any]]) -> None:
    answers = dict(of_kind(rows, "lookup"))
    question = "In the Python standard library, what does `shutil.copytree` do?"
    assert answers[question] == "Recursively copy a directory tree and return the destination directory."
    assert len(answers) > 20
    assert not [text for text in answers if "._" in text]


def test_summary_rows_show_source_without_its_docstring(rows: list[dict[str, Any]]) -> None:
    summaries = of_kind(rows, "summary")
    assert len(summaries) > 20
    for question, answer in summaries:
        assert question.startswith("Summarise what this Python function does.\n\n```python\n")
        assert answer not in " ".join(question.split())
        assert "\n" not in answer


def test_the_same_packages_give_the_same_rows_and_the_report_names_the_python(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    assert build(tmp_path / "again", packages=PACKAGES[::-1]) == rows
    report = json.loads((tmp_path / "again/report.json").read_text())
    assert report["python"] == platform.python_version()
    assert sum(report["rows"].values()) == len(rows)


def test_caps_hold_and_summaries_are_the_shortest(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    few = build(tmp_path / "few", max_lookup_rows=5, max_summary_rows=4)
    assert (len(of_kind(few, "lookup")), len(of_kind(few, "summary"))) == (5, 4)
    shortest = sorted(len(question) for question, _ in of_kind(rows, "summary"))[:4]
    assert sorted(len(question) for question, _ in of_kind(few, "summary")) == shortest
    assert set(of_kind(few, "lookup")) <= set(of_kind(rows, "lookup"))
    capped = of_kind(build(tmp_path / "capped", max_rows_per_package=3), "lookup")
    assert len(capped) == 3 * len(PACKAGES)


def test_another_package_is_named_in_the_question_and_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "mycompany"
    (package / "tests").mkdir(parents=True)
    code = 'def bill(order):\n    """Turn an order into an invoice."""\n    return Invoice(order)\n'
    (package / "__init__.py").write_text(f"raise SystemExit('imported')\n{code}")
    (package / "tests" / "test_bill.py").write_text(code.replace("bill", "checked"))
    (package / "broken.py").write_text("def :")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    questions = [question for question, _ in of_kind(build(tmp_path / "out", packages=["mycompany"]), "lookup")]
    assert questions == ["In the Python package `mycompany`, what does `mycompany.bill` do?"]


def test_unknown_packages_are_all_named_and_nothing_is_stored(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        ingest_sources(Store(tmp_path), DataSpec(packages=["json", "nosuchpackage", "noneither"]))
    assert [problem.where for problem in caught.value.problems] == ["nosuchpackage", "noneither"]
    assert not list(tmp_path.rglob("*.parquet"))


def test_rows_of_the_builder_name_their_kind_as_source(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    store = Store(tmp_path)
    snapshot = ingest_sources(store, DataSpec(packages=["json"], max_lookup_rows=2, max_summary_rows=2))
    sources = [row for part in snapshot.parts for row in pq.read_table(store.path(part)).column("source").to_pylist()]
    assert sorted(sources) == ["python-docs/lookup"] * 2 + ["python-docs/summary"] * 2


EXPLAINED = {
    "Return the sum of all\n    items.": "Return the sum of all items.",
    "One line is enough here.\n\nMore below.": "One line is enough here.",
    "index(value) -> int\n\nReturn the first index of value.": "Return the first index of value.",
    "Seeing is believing for all tests.": "Seeing is believing for all tests.",
    "Internally sorts the list of names.": "Internally sorts the list of names.",
}
NOT_EXPLAINED = [
    "Too short.",
    "See the documentation of the other one.",
    "Like shutil.copy but with metadata too.",
    "Internal helper of the parser module.",
    "Deprecated since 3.4 use the other.",
    "The following options are available here:",
    ">>> add(1, 2) gives you three",
    "index(value, [start, [stop]]) -> first index of value",
    "copy(source, target, follow=True, deep=False)",
    "+-----+ | a | b | +-----+ ===== -----",
    "Written by anna.schmidt@mail.net for all users.",
    "word " * 61,
]


@pytest.mark.parametrize("doc", EXPLAINED)
def test_a_paragraph_that_explains_is_taken_as_one_line(doc: str) -> None:
    assert explanation(doc) == EXPLAINED[doc]


@pytest.mark.parametrize("doc", NOT_EXPLAINED)
def test_a_paragraph_that_explains_nothing_is_left_out(doc: str) -> None:
    assert explanation(doc) is None


def test_functions_are_found_in_classes_and_branches_and_stubs_are_marked() -> None:
    source = '''
class Shop:
    """A shop."""
    @property
    def name(self):
        """The name."""
        return self._name
    def close(self):
        """To be written by subclasses."""
        raise NotImplementedError
if True:
    async def visit():
        """Go there."""
        def inner():
            """Inside."""
            return 1
        return inner
def one_line(): "All in one."; return 1
'''
    found = {function.name: function for function in functions(source)}
    assert set(found) == {"Shop.name", "Shop.close", "visit", "visit._locals.inner", "one_line"}
    assert found["Shop.name"].source == "@property\ndef name(self):\n    return self._name"
    assert [name for name, function in found.items() if function.stub] == ["one_line", "Shop.close"]
