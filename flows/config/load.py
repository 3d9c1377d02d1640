"""Read a run's YAML and its `--set` changes into a RunSpec; write one back with every setting annotated."""

import difflib
import json
import math
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node

from data_contracts.errors import ConfigError, Problem
from data_contracts.run_spec import RunSpec, StoreSpec
from flows.config.validation_errors import all_settings, spec_problems, unknown_key

PRESETS = Path(__file__).parent / "presets"
DEFAULT_PRESET = "demo"
# Text that needs no quotes in any place of a YAML file.
_PLAIN = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./@-]*(:[A-Za-z0-9_./@-]+)*")


@dataclass(frozen=True)
class LoadedSpec:
    """A checked spec, and for each dotted key where its value came from: default, `file.yaml:12` or `--set`."""

    spec: RunSpec
    origins: dict[str, str]
    source: str


@dataclass(frozen=True)
class WrittenSetting:
    """One setting as the user wrote it, and where."""

    key: str
    value: Any
    origin: str


def load_spec(preset_or_file: str | None, overrides: list[str]) -> LoadedSpec:
    """Answer with a valid spec or raise one ConfigError that lists everything wrong in the file and in `--set`."""
    path = _find(preset_or_file or DEFAULT_PRESET)
    given, problems = _read_file(path)
    changes, more = _read_overrides(overrides)
    return _resolve([*given, *changes], [*problems, *more], source=str(path))


def load_changes(overrides: list[str]) -> RunSpec:
    """The defaults with these changes, without a preset."""
    changes, problems = _read_overrides(overrides)
    return _resolve(changes, problems, source="--set").spec


def load_store(overrides: list[str]) -> StoreSpec:
    """Where the store is, for commands that need nothing else of a spec."""
    changes, problems = _read_overrides(overrides)
    problems += [
        Problem(f"{given.key} has no effect here", "--set", "this command only reads store.*", "leave it out")
        for given in changes
        if not given.key.startswith("store.")
    ]
    return _resolve(changes, problems, source="--set").spec.store


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _find(name: str) -> Path:
    """A path if it looks like one, otherwise a preset's name."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise ConfigError(Problem("no such file", name, act=f"write one with `tunegate init {name} --data PATH`"))
    if name in preset_names():
        return PRESETS / f"{name}.yaml"
    near = difflib.get_close_matches(name, preset_names(), n=1)
    guess = f"did you mean {near[0]}? " if near else ""
    limit = f"a preset ({', '.join(preset_names())}) or a .yaml or .yml file"
    raise ConfigError(
        Problem(f"no preset is called {name!r}", "preset", limit=limit, act=f"{guess}See `tunegate run --help`")
    )


# --- reading ------------------------------------------------------------------------------------------------


def _yaml() -> YAML:
    return YAML(typ="safe", pure=True)


def _read_file(path: Path) -> tuple[list[WrittenSetting], list[Problem]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        values, tree = _yaml().load(text), _yaml().compose(text)
    except (OSError, UnicodeError) as error:
        raise ConfigError(Problem(f"cannot be read: {error}", str(path), "a UTF-8 text file")) from error
    except YAMLError as error:
        raise ConfigError(_syntax_problem(error, str(path))) from error
    if values is None:
        return [], []
    if not isinstance(values, dict):
        act = "write sections such as `train:` with settings below them"
        raise ConfigError(Problem(f"holds a {type(values).__name__}", str(path), "a mapping", act))
    lines = dict(_key_lines(tree, ()))
    return _flatten(values, lines, path.name)


def _syntax_problem(error: YAMLError, where: str) -> Problem:
    act = "put values that begin with * & ! | > % @ or hold `: ` in quotes"
    if not isinstance(error, MarkedYAMLError):
        return Problem(f"is not YAML: {error}", where, act=act)
    mark = error.problem_mark
    where = f"{where}:{mark.line + 1}" if mark else where
    problem = (error.problem or str(error)).replace("\n", " ")
    if "duplicate key" in problem:
        return Problem(problem, where, "each key once", "delete one of the two")
    return Problem(f"is not YAML: {problem}", where, act=act)


def _key_lines(node: Node | None, prefix: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
    """(key path, 1-based line) of every key of the first two levels."""
    for key, value in node.value if isinstance(node, MappingNode) else []:
        yield (*prefix, str(key.value)), key.start_mark.line + 1
        if not prefix:
            yield from _key_lines(value, (str(key.value),))


def _flatten(
    values: dict[Any, Any], lines: dict[tuple[str, ...], int], name: str
) -> tuple[list[WrittenSetting], list[Problem]]:
    given: list[WrittenSetting] = []
    problems: list[Problem] = []
    for section, content in values.items():
        where = f"{name}:{lines.get((str(section),), 1)}"
        if section not in RunSpec.model_fields:
            problems.append(unknown_key(str(section), where))
        elif content is not None and not isinstance(content, dict):
            act = f"write `{section}:` and its settings indented below it"
            problems.append(Problem(f"{section} is {content!r}", where, "a section that holds settings", act))
        else:
            for field, value in (content or {}).items():
                where = f"{name}:{lines.get((str(section), str(field)), 1)}"
                given.append(WrittenSetting(f"{section}.{field}", value, where))
    problems += [unknown_key(item.key, item.origin) for item in given if item.key not in all_settings()]
    return given, problems


def _read_overrides(overrides: list[str]) -> tuple[list[WrittenSetting], list[Problem]]:
    given: list[WrittenSetting] = []
    problems: list[Problem] = []
    for text in overrides:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals:
            problems.append(Problem(f"{text!r} has no `=`", "--set", "key=value", "for example --set train.rank=8"))
        elif key not in all_settings() and _dict_setting(key) is None:
            problems.append(unknown_key(key, "--set"))
        else:
            try:
                given.append(WrittenSetting(key, _typed(key, value), "--set"))
            except YAMLError as error:
                problems.append(_syntax_problem(error, f"--set {key}"))
    return given, problems


def _dict_setting(key: str) -> str | None:
    """`data.columns` for `data.columns.prompt`: settings that are mappings take one entry each."""
    parent, _, entry = key.rpartition(".")
    is_mapping = parent in all_settings() and get_origin(all_settings()[parent].annotation) is dict
    return parent if is_mapping and entry else None


def _typed(key: str, text: str) -> Any:
    """The value of a `--set`: YAML, except that settings made of text take it as typed (`;`, `*.jsonl`, `007`)."""
    annotation = all_settings()[key].annotation if key in all_settings() else str
    takes_text = annotation is str or (str in get_args(annotation) and get_origin(annotation) is not dict)
    if takes_text and not text.startswith(("[", '"', "'")):
        nullable = type(None) in get_args(annotation)
        return None if nullable and text in ("", "null", "~") else text
    return _yaml().load(text)


# --- resolving ----------------------------------------------------------------------------------------------


def _resolve(given: list[WrittenSetting], problems: list[Problem], source: str) -> LoadedSpec:
    """Later values win over earlier ones; everything wrong is reported at once."""
    nested: dict[str, dict[str, Any]] = {}
    origins = dict.fromkeys(all_settings(), "default")
    for item in given:
        parent = _dict_setting(item.key)
        section, _, field = (parent or item.key).partition(".")
        if f"{section}.{field}" not in all_settings():
            continue
        values = nested.setdefault(section, {})
        if parent:
            earlier = values.get(field)
            entry = {item.key.rpartition(".")[2]: item.value}
            values[field] = {**earlier, **entry} if isinstance(earlier, dict) else entry
        else:
            values[field] = _normal(item.key, item.value)
        origins[f"{section}.{field}"] = item.origin
        if isinstance(item.value, float) and not math.isfinite(item.value):
            problems = [*problems, Problem(f"{item.key} is {item.value}", item.origin, "a finite number")]
    try:
        spec = RunSpec.model_validate(nested, strict=True)
    except ValidationError as error:
        raise ConfigError(*problems, *spec_problems(error, nested, origins)) from error
    if problems:
        raise ConfigError(*problems)
    return LoadedSpec(spec, origins, source)


def _normal(key: str, value: Any) -> Any:
    """A single string where a list of them belongs is a list of one; `~` in the store's root is the home folder."""
    if not isinstance(value, str):
        return value
    if key == "store.root":
        return str(Path(value).expanduser())
    return [value] if get_origin(all_settings()[key].annotation) is list else value


# --- writing ------------------------------------------------------------------------------------------------


def write_spec(path: Path, spec: RunSpec, head_comment: str) -> None:
    """Write every setting of a spec with its meaning; refuses to touch a file that is there."""
    write_new(path, "\n".join([*_comment(head_comment, ""), *_annotated(spec)]) + "\n")


def write_new(path: Path, text: str) -> None:
    """Write a file that is not there yet."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        act = "give another name, or delete it yourself"
        raise ConfigError(Problem("is there already", str(path), "init overwrites nothing", act)) from error
    except OSError as error:
        raise ConfigError(
            Problem(f"cannot be written: {error.strerror}", str(path), act="give another path")
        ) from error


def _annotated(spec: RunSpec) -> Iterator[str]:
    for section in RunSpec.model_fields:
        yield f"\n{section}:"
        found = getattr(spec, section)
        values = found.model_dump(mode="json")
        for name, field in type(found).model_fields.items():
            yield from _comment(field.description or "", "  ")
            yield f"  {name}: {yaml_inline(values[name])}"


def _comment(text: str, indent: str) -> Iterator[str]:
    for line in text.splitlines():
        start = f"{indent}# "
        yield from textwrap.wrap(line, 110, initial_indent=start, subsequent_indent=start, break_on_hyphens=False)


def yaml_inline(value: Any) -> str:
    """A value as YAML on one line, in quotes where YAML would read it as something else."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{yaml_inline(key)}: {yaml_inline(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(yaml_inline, value))}]"
    if not isinstance(value, str):
        return json.dumps(value)
    # Checked inside a list, as it will be written: alone, three dots would end the document.
    plain = _PLAIN.fullmatch(value) and _yaml().load(f"[{value}]") == [value]
    return value if plain else f'"{"".join(map(_escaped, value))}"'


def _escaped(character: str) -> str:
    if character in ('"', "\\"):
        return f"\\{character}"
    return character if character.isprintable() else f"\\U{ord(character):08x}"
