"""A gate decision as files: JSON for scripts, Markdown for people, JUnit XML for dashboards."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from data_contracts.errors import ConfigError, Problem
from flows.cli.output import show_problems, write_json
from tasks.reporting.markdown import environment, escape, needs, plain_interval, plain_number

if TYPE_CHECKING:  # `gate` looks at its folder before anything slow is imported
    from data_contracts.verdict import Decision

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def make_folder(folder: Path | None) -> None:
    """Raise ConfigError now, not after the evaluation, if the files could not be written."""
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        act = "name a folder you may write to"
        raise ConfigError(Problem(f"cannot be made: {error.strerror}", f"--report {folder}", act=act)) from error


def write_decision(decision: "Decision", folder: Path | None) -> None:
    """gate.json, gate.md and gate.xml into the folder; the Markdown also to the CI job's own page, if it has one."""
    from flows.cli.pages.payloads import decision_summary

    page = markdown(decision)
    if folder:
        # A lone surrogate, which JSON Lines can hold, becomes its escape again.
        with (folder / "gate.json").open("w", encoding="utf-8", errors="backslashreplace") as stream:
            write_json(decision_summary(decision), stream)
        (folder / "gate.md").write_text(page, encoding="utf-8")
        (folder / "gate.xml").write_text(junit(decision), encoding="utf-8")
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        try:
            with Path(summary).open("a", encoding="utf-8") as file:
                file.write(page + "\n")
        except OSError as error:
            show_problems("warning", [Problem(f"not written: {error.strerror}", "GITHUB_STEP_SUMMARY")])


# --- Markdown -----------------------------------------------------------------------------------------------


def markdown(decision: "Decision", details: bool = True) -> str:
    """The verdict first, then the gates, then all that was measured. Every text is escaped."""
    text = (
        environment(escape, Path(__file__).parent / "templates")
        .get_template("gate.md.j2")
        .render(decision=decision, found=decision.comparison, details=details)
    )
    return text.rstrip() + "\n"


# --- JUnit --------------------------------------------------------------------------------------------------


def junit(decision: "Decision") -> str:
    """A test case for each gate. An inconclusive gate is a failure of that type: a skipped test is green on dashboards.

    Raises nothing for odd characters: those that XML cannot hold become question marks.
    """
    gates, off = decision.gate.gates, decision.gate.off
    failures = sum(gate.verdict != "pass" for gate in gates) + (not gates)
    counts = {"tests": str(len(gates) + len(off) + (not gates)), "failures": str(failures), "errors": "0"}
    root = ElementTree.Element("testsuites", counts)
    name = _xml(f"tunegate gate {decision.name} version {decision.version}")
    suite = ElementTree.SubElement(root, "testsuite", {"name": name, **counts, "skipped": str(len(off))})
    for gate in gates:
        case = _case(suite, gate.name)
        measured = f"{plain_number(gate.actual)} ({plain_interval(gate.interval)})"
        text = _xml(f"needs {needs(gate)}, measured {measured}: {gate.why}")
        if gate.verdict == "pass":
            ElementTree.SubElement(case, "system-out").text = text
        else:
            ElementTree.SubElement(case, "failure", {"type": gate.verdict, "message": _xml(gate.why)}).text = text
    for setting in off:
        ElementTree.SubElement(_case(suite, setting), "skipped", {"message": "turned off in the spec"})
    if not gates:  # the verdict is then fail, and skipped tests alone would be green
        ElementTree.SubElement(_case(suite, "verdict"), "failure", {"type": "fail", "message": "every gate is off"})
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _case(suite: ElementTree.Element, name: str) -> ElementTree.Element:
    return ElementTree.SubElement(suite, "testcase", {"classname": "tunegate.gate", "name": _xml(name)})


def _xml(text: str) -> str:
    return _NOT_XML.sub("?", text)
