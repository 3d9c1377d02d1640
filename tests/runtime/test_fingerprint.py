"""Stage keys follow the code that shapes a result, and no text. Run: pytest tests/runtime/test_fingerprint.py"""

import ast
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tasks.pipeline.policies import POLICIES, stage_key
from tasks.runtime import fingerprint

ROOT = Path(__file__).parents[2]

# A module with a stage's own rules or formulas -> the stages whose keys change with it. Those after them follow by the
# digests of what they are given.
FORMULAS = {
    "tasks.data.ingestion.core.formats": {"ingest"},
    "tasks.data.ingestion.sources": {"ingest"},
    "tasks.data.validation.core.text_rules": {"validate"},
    "tasks.data.curation.core.minhash": {"curate"},
    "tasks.data.curation.dataset_files": {"curate"},
    "tasks.evaluation.workers.benchmark_items": {"benchmarks"},
    "tasks.models.base": {"prepare_base", "init_adapter"},
    "tasks.models.workers.prepare_base": {"prepare_base"},
    "tasks.models.workers.init_adapter": {"init_adapter"},
    "tasks.training.warm_start": {"choose_start"},
    "tasks.evaluation.core.items": {"benchmarks", "check_tasks", "evaluate", "serve_alone"},
    "tasks.training.workers.trainer": {"train"},
    "data_contracts.jobs.training": {"train"},
    "tasks.runtime.workers.ranks": {"train"},
    "tasks.models.workers.scoring": {"train", "check_tasks", "evaluate", "serve_alone"},
    "tasks.evaluation.core.comparison": {"compare"},
    "tasks.evaluation.core.stats": {"evaluate", "serve_alone", "compare", "gate"},
    "tasks.evaluation.core.gates": {"gate"},
    "tasks.reporting.mlflow_run": {"record"},
    "tasks.release.evidence": {"register"},
    "tasks.release.workers.served_model": {"register"},
    "tasks.release.workers.check_release": {"load_back"},
    "tasks.release.promotion": {"promote"},
    "tasks.reporting.html_report": {"report"},
    "tasks.reporting.sentences": {"record", "register", "report"},
}
# How a result is reached, shown, planned or announced: its code changes no key.
SHAPES_NO_RESULT = [
    "data_contracts.run_spec",
    "data_contracts.verdict",
    "data_contracts.retry_table",
    "tasks.runtime.store",
    "tasks.runtime.processes",
    "tasks.runtime.console",
    "tasks.runtime.workers.harness",
    "tasks.models.integrity",
    "tasks.training.core.memory",
    "tasks.training.workers.planned_memory",
    "tasks.pipeline.notifications",
    "tasks.pipeline.stages",
    "flows.retrain",
]


def keys() -> dict[str, str]:
    return {name: stage_key(name, {}) for name in POLICIES}


@pytest.fixture(scope="module")
def before() -> dict[str, str]:
    return keys()


def changed(before: dict[str, str]) -> set[str]:
    return {name for name, key in keys().items() if key != before[name]}


@pytest.fixture
def edited(tmp_path, monkeypatch) -> Callable[[str], None]:
    """Let one module have another line of code."""
    file_of = fingerprint._file

    def edit(module: str) -> None:
        file, copy = file_of(module), tmp_path / "edited.py"
        assert file, module
        copy.write_text(file.read_text() + "\nFACTOR = 2\n")
        monkeypatch.setattr(fingerprint, "_file", lambda name: copy if name == module else file_of(name))

    return edit


def test_every_stage_has_a_formula_to_change():
    assert set().union(*FORMULAS.values()) == set(POLICIES)


@pytest.mark.parametrize(("module", "stages"), FORMULAS.items())
def test_a_changed_formula_changes_the_keys_of_its_stages_and_no_other(before, edited, module, stages):
    edited(module)
    assert changed(before) == stages


@pytest.mark.parametrize("module", SHAPES_NO_RESULT)
def test_code_that_shapes_no_result_changes_no_key(before, edited, module):
    edited(module)
    assert changed(before) == set()


def test_other_docstrings_comments_annotations_and_help_texts_change_no_key(before, copy_of_code):
    files = sorted(copy_of_code.rglob("*.py"))
    texts = sum(_reword(file) for file in files)
    assert texts > 1000
    assert changed(before) == set()


def _reword(file: Path) -> int:
    """Change every docstring, those of settings too, and every annotation of a return value; add a comment. How many
    texts."""
    source = file.read_text()
    lines, count = source.splitlines(), 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            line = node.lineno - 1
            lines[line] = lines[line].replace('"""', '"""Reworded. ', 1)
            count += 1
    text = re.sub(r" -> (?:None|str|int|bool|float):$", ' -> "object":', "\n".join(lines), flags=re.MULTILINE)
    file.write_text(f"{text}\n# another comment\n")
    return count


def test_a_changed_template_changes_the_key_of_its_stage(before, copy_of_code):
    with (copy_of_code / "tasks" / "reporting" / "templates" / "report.html.j2").open("a") as file:
        file.write("<hr>")
    assert changed(before) == {"report"}


@pytest.mark.parametrize("call", ["say('note', text=TEXT)", "note(TEXT)", "raise ValueError(Problem(TEXT, act=TEXT))"])
def test_what_a_message_says_is_no_code(tmp_path, call):
    def digest(text: str) -> str:
        file = tmp_path / f"{text}.py"
        file.write_text(f"def f():\n    {call.replace('TEXT', repr(text))}\n")
        return fingerprint.read_module(file)[0]

    assert digest("loading") == digest("reading")


def test_a_raised_version_changes_the_key_of_its_stage_alone(before, monkeypatch):
    monkeypatch.setitem(POLICIES, "compare", replace(POLICIES["compare"], version=2))
    assert changed(before) == {"compare"}


def test_a_helper_is_followed_through_the_imports(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "_ROOT", tmp_path)
    (tmp_path / "tasks").mkdir()

    def digest(stage_code: str, helper_code: str) -> str:
        (tmp_path / "tasks" / "stage.py").write_text(stage_code)
        (tmp_path / "tasks" / "helper.py").write_text(helper_code)
        fingerprint.read_module.cache_clear()
        return fingerprint.code_digest(("tasks.stage",))

    first = digest("from tasks import helper\n", "x: int = 1\n")
    assert first == digest("from tasks import helper  # why\n", "\nx: float = 1\n")
    assert first != digest("from tasks import helper\n", "x: int = 2\n")
    fingerprint.read_module.cache_clear()


def test_every_stage_names_modules_and_libraries_that_exist():
    assert len(POLICIES) > 10
    for name, policy in POLICIES.items():
        assert all(fingerprint._file(module) or (ROOT / module).is_file() for module in policy.code), name
        assert fingerprint.library_versions(policy.libraries).keys() == set(policy.libraries)
