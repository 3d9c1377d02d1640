"""Writes docs/reference/*.md from the code, so that no page says what the code does not.

Run: python docs/generate_reference.py (`make docs` does). tests/project/test_docs.py fails where a page differs.
"""

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

from typer.main import get_command

from data_contracts import rows
from data_contracts.data_spec import RulesSpec
from data_contracts.errors import ERRORS, TunegateError
from data_contracts.retry_table import KINDS
from data_contracts.rows import LEAKS, UNREADABLE, Reason, action_of
from data_contracts.run_spec import GateSpec, RunSpec
from data_contracts.verdict import Comparison, GateResult
from flows.cli.app import app
from flows.cli.output import EXIT_CODES, INTERRUPTED, USAGE
from tasks.evaluation.core.gates import judge

FOLDER = Path(__file__).parent / "reference"
HEAD = "<!-- Made by docs/generate_reference.py from {sources}. Change the code, then run make docs. -->\n\n"
# A setting's unit is the end of its name, as the code has it; a share is a number from 0 to 1.
UNITS = {
    "max_ms_per_token": "milliseconds per written token",
    "max_memory_gb": "GB (10^9 bytes)",
    "_nats": "nats per token",
    "_seconds": "seconds",
    "_minutes": "minutes",
    "_days": "days",
    "_tokens": "tokens",
    "_steps": "optimiser steps",
    "_rows": "rows",
    "_items": "items",
    "_chars": "characters",
    "_words": "words",
    "threads": "CPU threads of a process",
    "_draws": "resamples",
}
# Every gate is a setting that null turns off.
_GATE_SETTINGS = [name for name, field in GateSpec.model_fields.items() if type(None) in get_args(field.annotation)]
Schema = dict[str, Any]


def pages() -> dict[str, str]:
    """File name -> text of every page of the reference."""
    makers: dict[str, Callable[[], str]] = {
        "settings.md": settings_page,
        "commands.md": commands_page,
        "exit-codes.md": exit_codes_page,
        "quarantine-reasons.md": reasons_page,
        "gates.md": gates_page,
    }
    return {name: make() for name, make in makers.items()}


def table(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table; cells are made safe for it."""
    rows_ = [head, ["---"] * len(head), *([_cell(text) for text in line] for line in lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in rows_) + "\n"


def _cell(text: str) -> str:
    return linked(" ".join(text.split())).replace("|", "\\|")


def linked(text: str) -> str:
    """`docs/x.md` in a text of the code as a link, seen from docs/reference; what looks like HTML as code."""
    text = re.sub(r"docs/([\w/-]+\.md)", r"[docs/\1](../\1)", text)
    return re.sub(r"(?<!`)(<\|?\w[^>`]*>|\{\{\w+\}\})(?!`)", r"`\1`", text)


# --- settings -----------------------------------------------------------------------------------------------


def settings_page() -> str:
    """Every setting of RunSpec."""
    text = HEAD.format(sources="data_contracts/run_spec.py, data_spec.py and train_spec.py")
    text += """# Settings

A preset is a YAML file with these sections; what it leaves out has the default. `--set` changes a setting for one run, and
`--dry-run` shows every value and the file and line that it comes from, without running anything:

```
tunegate run my.yaml --set train.rank=32 --dry-run
```

`tunegate init` writes a preset with all of them and their meanings. A share is a number from 0 to 1.
"""
    schema = RunSpec.model_json_schema()
    for section in RunSpec.model_fields:
        text += f"\n## {section}\n"
        text += "".join(_setting(section, name, field, schema) for name, field in _fields(schema, section))
    return text


def _fields(schema: Schema, section: str) -> list[tuple[str, Schema]]:
    return list(schema["$defs"][_name_of(schema["properties"][section])]["properties"].items())


def _name_of(field: Schema) -> str:
    """The definition that a schema refers to."""
    return str(field["$ref"] if "$ref" in field else field["allOf"][0]["$ref"]).rpartition("/")[2]


def _setting(section: str, name: str, field: Schema, schema: Schema) -> str:
    default = RunSpec.model_fields[section].default
    value = plain_value(getattr(default, name))
    unit = next((unit for end, unit in UNITS.items() if name.endswith(end)), "")
    facts = [f"Default: `{value}`.", f"Values: {values_of(field, schema)}.", f"Unit: {unit}." if unit else ""]
    return f"\n### `{section}.{name}`\n\n{linked(field['description'])}\n\n{' '.join(filter(None, facts))}\n"


def plain_value(value: object) -> str:
    """A default as YAML writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(plain_value, value))}]"
    if isinstance(value, float):
        return f"{value:g}" if value >= 1e-3 or value == 0 else re.sub(r"e-0?", "e-", f"{value:g}")
    return str(value)


def values_of(field: Schema, schema: Schema) -> str:
    """What a setting may be, in words."""
    if "$ref" in field:
        return values_of(schema["$defs"][_name_of(field)], schema)
    if "anyOf" in field:
        kinds = [values_of(kind, schema) for kind in field["anyOf"]]
        return " or ".join(kinds)
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    kind = field.get("type")
    if kind == "array":
        least = "at least one of " if field.get("minItems") else ""
        return f"a list of {least}{values_of(field['items'], schema)}"
    if kind == "object" and "properties" in field:
        inner = [f"`{name}` ({_inner(part, schema)})" for name, part in field["properties"].items()]
        return f"objects with {', '.join(inner)}"
    if kind == "object":
        of = field.get("additionalProperties")
        return f"a mapping to {values_of(of, schema)}" if isinstance(of, dict) and of else "a mapping"
    words = {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "boolean": "`true` or `false`",
        "null": "`null`",
    }
    return f"{words.get(str(kind), str(kind))}{_range(field)}"


def _inner(field: Schema, schema: Schema) -> str:
    text = values_of(field, schema)
    return f"{text}, `null` by default" if field.get("default", ...) is None else text


def _range(field: Schema) -> str:
    if {"minimum", "maximum"} <= field.keys():
        return f" from {field['minimum']:g} to {field['maximum']:g}"
    signs = {"minimum": "at least", "exclusiveMinimum": "over", "maximum": "at most", "exclusiveMaximum": "under"}
    parts = [f"{word} {field[key]:g}" for key, word in signs.items() if key in field]
    parts += [f"that matches `{field['pattern']}`"] if "pattern" in field else []
    return f" {' and '.join(parts)}" if parts else ""


# --- commands -----------------------------------------------------------------------------------------------


def commands_page() -> str:
    """Every command with its arguments and options, as `--help` gives them."""
    text = HEAD.format(sources="flows/cli/")
    text += f"""# Commands

{plain_sentence(str(app.info.help))} Every command takes `--json`: one JSON object on stdout, everything else on stderr; and
`--help`. What it ends with: [exit codes](exit-codes.md). Settings for `--set`: [settings](settings.md).
"""
    return text + "".join(_command(name, command) for name, command in _commands())


def plain_sentence(text: str) -> str:
    return " ".join(text.split())


def _commands() -> Iterator[tuple[str, Any]]:
    """Name and command, those of groups after their group. Typer has its own copy of click, which it does not export."""
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        if command.hidden:
            continue
        yield name, command
        yield from ((f"{name} {inner}", found) for inner, found in getattr(command, "commands", {}).items())


def _command(name: str, command: Any) -> str:
    context = command.context_class(command, info_name=f"tunegate {name}")
    usage = " ".join(command.get_usage(context).split()).removeprefix("Usage: ")
    records = [(parameter.get_help_record(context) or _argument(parameter, context)) for parameter in command.params]
    lines = [[f"`{use}`", meaning] for use, meaning in filter(None, records) if "--json" not in use]
    text = f"\n## tunegate {name}\n\n{linked(plain_sentence(command.help or ''))}\n\n```\n{usage}\n```\n"
    return text + (f"\n{table(['argument or option', 'meaning'], lines)}" if lines else "")


def _argument(parameter: Any, context: Any) -> tuple[str, str]:
    return parameter.make_metavar(context), parameter.help or ""


# --- exit codes and errors ----------------------------------------------------------------------------------


def exit_codes_page() -> str:
    """Every exit code, every error class, and what an error of a library becomes."""
    text = HEAD.format(sources="data_contracts/errors.py, data_contracts/retry_table.py and flows/cli/output.py")
    text += "# Exit codes and errors\n\n"
    text += table(["exit code", "meaning", "what to do"], list(_codes()))
    text += """
With `--json` a failed command prints `{"error": {"kind": ..., "problems": [{"what", "where", "limit", "act"}]}, "exit_code": ...}`:
`kind` is a class below, and `act` the next act. Without `--json` the same stands on stderr, each problem with its `limit:` and `next:`.
A traceback goes into a file whose name the message gives; `TUNEGATE_DEBUG=1` prints it.

## Errors of Tunegate

"""
    lines = [
        [f"`{name}`", str(cls.exit_code), plain_sentence(cls.__doc__ or ""), _parent(cls)]
        for name, cls in ERRORS.items()
    ]
    text += table(["error", "exit code", "meaning", "kind of"], lines)
    text += """
## Errors of libraries and of the system

An error of a library, a server or the operating system is reported as one of the errors above. The first row that fits anything in its
chain of causes counts. What is in no row is a bug: exit code 4, and a traceback in a file. Retried means three more tries, after about
2, 15 and 60 seconds: [failures](../failures.md).

"""
    kinds = [
        [
            kind.name,
            kind.seen,
            f"`{kind.error.__name__}`, {kind.error.exit_code}",
            "retried" if kind.retried else "stops",
            kind.act,
        ]
        for kind in KINDS
    ]
    return text + table(["kind", "recognised by", "reported as, exit code", "then", "next act"], kinds)


def _codes() -> Iterator[list[str]]:
    verdicts = {code: verdict for verdict, code in EXIT_CODES.items()}
    by_code: dict[int, list[str]] = {}
    for name, cls in ERRORS.items():
        by_code.setdefault(cls.exit_code, []).append(f"`{name}`")
    meanings = {
        EXIT_CODES["pass"]: ("done", "nothing"),
        EXIT_CODES["fail"]: ("the answer is no", "read which gate and why: `tunegate compare`"),
        USAGE: ("what you gave is wrong", "do what `next:` says; the same command again changes nothing"),
        EXIT_CODES["inconclusive"]: ("cannot be decided yet", "add as many held-out items or seeds as the gate says"),
        TunegateError.exit_code: (
            "the machine, a server or a library failed",
            "do what `next:` says, then the same command again",
        ),
        INTERRUPTED: ("stopped by you (Ctrl-C)", "the same command again resumes"),
    }
    for code, (meaning, act) in sorted(meanings.items()):
        found = [f"verdict {verdicts[code]}"] if code in verdicts else []
        found += [", ".join(by_code[code])] if code in by_code else []
        yield [f"`{code}`", f"{meaning}{': ' if found else ''}{'; '.join(found)}", act]


def _parent(cls: type[TunegateError]) -> str:
    parent = next((base for base in cls.__mro__[1:] if base.__name__ in ERRORS), None)
    return f"`{parent.__name__}`" if parent else ""


# --- quarantine reasons -------------------------------------------------------------------------------------


def reasons_page() -> str:
    """Every reason why a row is rejected."""
    text = HEAD.format(sources="data_contracts/rows.py")
    text += """# Quarantine reasons

A rejected row is kept with one reason, a detail, its file and its line. `tunegate data explain FILE:LINE` shows them, and
`tunegate data release --reason REASON --why TEXT` brings rows back. Default `flag`: the row is counted and kept.
How often a rule is wrong: [data](../data.md#how-often-a-rule-is-wrong).

"""
    meanings = attribute_docstrings(rows, Reason.__name__)
    lines = [[f"`{reason.value}`", meanings[reason.name], *_handling(reason)] for reason in Reason]
    return text + table(["reason", "meaning", "default", "changed by", "brought back by"], lines)


def _handling(reason: Reason) -> list[str]:
    """What is done about a reason, which setting changes that, and what brings a row back."""
    release = "`tunegate data release`"
    own = {Reason.PERSONAL_DATA: "personal_data", Reason.SECRET: "secrets"}.get(reason)
    if own:
        return [RulesSpec.model_fields[own].default, f"[`rules.{own}`](settings.md#rules{own})", release]
    default = action_of(reason, {})
    if reason in LEAKS:
        return [default, "nothing: the row would leak", "nothing: the row would leak"]
    if reason in UNREADABLE:
        return [default, "nothing: there is no conversation", "a repaired source"]
    return [default, f"[`rules.actions.{reason.value}`](settings.md#rulesactions)", release]


def attribute_docstrings(module: Any, name: str) -> dict[str, str]:
    """The texts below the members of a class: Python itself does not keep them."""
    tree = ast.parse(inspect.getsource(module))
    (found,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    texts: dict[str, str] = {}
    for member, text in zip(found.body, found.body[1:], strict=False):
        if isinstance(member, ast.Assign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            texts[ast.unparse(member.targets[0])] = str(text.value.value)
    return texts


# --- gates --------------------------------------------------------------------------------------------------


def gates_page() -> str:
    """Every gate, judged once on a comparison without numbers, which shows its name and its claim."""
    text = HEAD.format(sources="tasks/evaluation/core/gates.py and data_contracts/run_spec.py")
    text += """# Gates

Each gate is one setting of `gates`, and `null` turns it off. It passes only if its whole interval clears the limit, fails only if the
whole interval misses it, and is inconclusive in between. A missing number fails. All gates must pass. Formulas and error rates:
[statistics](../statistics.md).

"""
    gates = [[f"`{gate.name}`", f"{gate.direction} the limit", *_gate_setting(name)] for name, gate in _judged_gates()]
    text += table(["gate", "must be", "setting", "default", "meaning"], gates)
    text += """
`keeps_general_knowledge` becomes one gate a task: `keeps_general_piqa`, for example. Where no other version is in production,
`not_worse_than_champion` passes by rule and says so.

## How the gates judge

"""
    others = [name for name in GateSpec.model_fields if name not in _GATE_SETTINGS]
    return text + table(["setting", "default", "meaning"], [_gate_setting(name) for name in others])


def _gate_setting(name: str) -> list[str]:
    field = GateSpec.model_fields[name]
    return [f"[`{name}`](settings.md#gates{name})", f"`{plain_value(field.default)}`", field.description or ""]


def _judged_gates() -> list[tuple[str, GateResult]]:
    return [(name, gate) for name in _GATE_SETTINGS for gate in _judged(name)]


def _judged(setting: str) -> list[GateResult]:
    settings = GateSpec.model_validate({name: None for name in _GATE_SETTINGS} | {setting: 0.5})
    empty: dict[str, Any] = {"gains": {}, "general": [], "slices": []}
    empty |= dict.fromkeys(("retention", "accuracy_drop", "gain", "champion_gain", "stop_rate"))
    missing = Comparison.model_construct(**empty)
    return judge(missing, settings, champion="the champion").gates


def main() -> None:
    """Write every page."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
