"""The door for CI: its files, its comment on a pull request, and the workflow's own steps, run with bash.

The steps need two runs of the smoke preset, about three minutes: `pytest -m slow` runs them, as `.ci/run` does.
Run: pytest tests/flows/test_ci.py
"""

import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from xml.etree import ElementTree

import pytest
from ruamel.yaml import YAML
from urllib3.util import Retry

from data_contracts.errors import ConfigError
from data_contracts.run_spec import StoreSpec
from data_contracts.verdict import Claim, Decision, Estimate, GateReport, GateResult, SliceGain, TaskChange
from flows.cli.app import main
from flows.cli.pages import pull_request
from flows.cli.pages.gate_report import junit, markdown, write_decision
from flows.cli.pages.pull_request import body, find_thread, marker, put_comment
from tasks.reporting.markdown import escape
from tests.support.planted import comparison, estimate

ROOT = Path(__file__).parents[2]
TOKEN = "ghs_secret"


def gate(
    name: str, verdict: str, why: str, found: Estimate | None = None, needs: tuple = ("at least", 0.8)
) -> GateResult:
    measured = {"actual": found.value, "interval": found.interval} if found else {"actual": None, "interval": None}
    return GateResult(name=name, direction=needs[0], threshold=needs[1], verdict=verdict, why=why, **measured)


def planted(**changes) -> Decision:
    """A gate decision on version 3 against version 2, with numbers that nobody measured."""
    measured = comparison(
        "candidate", 40, 31,
        nll_nats={"base": 5.83, "candidate": 4.39, "champion": 4.37},
        bits_per_byte={"base": 4.2, "candidate": 3.1, "champion": 3.08},
        gains={"candidate": estimate(1.44)}, gain=estimate(1.44), champion_gain=estimate(-0.02, 0.01),
        accuracy={"base": 0.25, "candidate": 0.35, "champion": 0.34}, stop_rate=estimate(0.9),
        slices=[SliceGain(kind="source", name="json|`x`", items=34, gain=estimate(1.5))],
        general=[
            TaskChange(
                task="general_piqa", metric="acc", items=100, base=0.52, candidate=0.51, change=estimate(-0.01), p=0.8
            )
        ],
        forms={"merged": estimate(0.01, 0.005)},
        claims=[Claim(claim="keeps 99 %", source="a|b", measured=None, verdict="cannot tell", note="one arm <only>")],
    )  # fmt: skip
    gates = [
        gate("gain", "pass", "the whole interval is above 0", measured.gain, ("more than", 0.0)),
        gate("champion", "inconclusive", "the interval holds -0.02", measured.champion_gain, ("at least", -0.02)),
    ]
    report = GateReport(gates=gates, off=["max_ms_per_token"], verdict="inconclusive")
    made = Decision(
        model="models:/tunegate-smoke@challenger",
        name="tunegate-smoke",
        version="3",
        champion="tunegate-smoke version 2",
        gate=report,
        comparison=measured,
    )
    return made.model_copy(update=changes)


def with_gates(*gates: GateResult, verdict: str = "fail", off: tuple[str, ...] = ()) -> Decision:
    return planted(gate=GateReport(gates=list(gates), off=list(off), verdict=verdict))


# --- Markdown -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        ("pass", "**PASS** tunegate-smoke version 3 may be released"),
        ("fail", "**FAIL** tunegate-smoke version 3 must not be released"),
        ("inconclusive", "**INCONCLUSIVE** tunegate-smoke version 3 cannot be decided yet"),
    ],
)
def test_the_verdict_is_the_first_line(verdict, said):
    assert markdown(with_gates(verdict=verdict)).splitlines()[0] == said


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_table_of_the_markdown_has_as_many_cells_in_each_row():
    tables = re.findall(r"(?:^\|.*\n)+", markdown(planted()), re.MULTILINE)
    assert len(tables) == 5
    for table in tables:
        rows = [cells(line) for line in table.splitlines()]
        assert len({len(row) for row in rows}) == 1
        assert len(rows) >= 3


def test_a_gate_is_one_line_with_what_it_needs_and_what_was_measured():
    lines = [cells(line) for line in markdown(planted()).splitlines() if line.startswith("|")]
    assert lines[2][:5] == ["gain", "more than 0", "1.440", "1.390 to 1.490", "pass"]
    assert lines[3][:5] == ["champion", "at least -0.02", "-0.020", "-0.030 to -0.010", "**inconclusive**"]
    assert "Turned off: max_ms_per_token." in markdown(planted())


def test_without_a_version_in_production_it_says_so():
    assert "No version was in production" in markdown(planted(champion=None))
    assert "Compared with tunegate-smoke version 2" in markdown(planted())


HOSTILE = "a|b`c`<script>x</script>[l](http://e)\n\n# h *b* _i_ @team"


def test_text_from_data_or_a_name_is_shown_and_never_read():
    shown = escape(HOSTILE)
    assert not set("|`<>[]*#\n") & set(re.sub(r"&#\d+;", "", shown))
    assert "&#95;i&#95;" in shown
    assert "@&#8203;team" in shown
    assert escape("min_gain_nats") == "min_gain_nats"
    page = markdown(
        with_gates(gate(HOSTILE, "fail", HOSTILE)).model_copy(update={"name": HOSTILE, "champion": HOSTILE})
    )
    assert "<script" not in page
    assert page.count(shown) == 4


def test_markdown_renders_a_hostile_text_as_it_was():
    from markdown_it import MarkdownIt

    html = MarkdownIt("commonmark").enable("table").render(markdown(with_gates(gate("g", "fail", HOSTILE))))
    assert "&lt;script&gt;x&lt;/script&gt;[l](http://e) # h *b* _i_" in html
    assert html.count("<th>") >= 4
    assert "<script" not in html


def test_the_page_about_ci_shows_what_the_command_writes():
    text = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"<!-- example -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert shown.strip() == markdown(planted()).strip()


# --- JUnit --------------------------------------------------------------------------------------------------


def suite_of(decision: Decision) -> ElementTree.Element:
    root = ElementTree.fromstring(junit(decision).encode())
    assert root.tag == "testsuites"
    (suite,) = root
    cases = suite.findall("testcase")
    assert suite.get("tests") == root.get("tests") == str(len(cases))
    assert suite.get("failures") == root.get("failures") == str(len(suite.findall("testcase/failure")))
    assert suite.get("skipped") == str(len(suite.findall("testcase/skipped")))
    return suite


def test_junit_has_a_case_for_each_gate_and_none_that_did_not_pass_is_green():
    suite = suite_of(
        with_gates(
            gate("a", "pass", "fine"),
            gate("b", "fail", "no", estimate(0.9)),
            gate("c", "inconclusive", "?"),
            off=("d",),
        )
    )
    found = {case.get("name"): [child.tag for child in case] for case in suite}
    assert found == {"a": ["system-out"], "b": ["failure"], "c": ["failure"], "d": ["skipped"]}
    assert [failure.get("type") for failure in suite.iter("failure")] == ["fail", "inconclusive"]
    assert next(f.text for f in suite.iter("failure")) == "needs at least 0.8, measured 0.900 (0.850 to 0.950): no"


def test_junit_without_any_gate_is_red():
    suite = suite_of(with_gates(off=("a", "b")))
    assert [failure.get("message") for failure in suite.iter("failure")] == ["every gate is off"]


def test_junit_survives_what_xml_cannot_hold():
    suite = suite_of(with_gates(gate("a\x00<b>", "fail", 'x\x1b "&" \ud800')))
    (case,) = suite
    (failure,) = case
    assert (case.get("name"), failure.get("message")) == ("a?<b>", 'x? "&" ?')


# --- files --------------------------------------------------------------------------------------------------


def test_the_report_folder_holds_the_same_json_as_the_command_prints(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    asked = deciding(monkeypatch, planted())
    code = main(["gate", "smoke", "--model", "models:/m/3", "--baseline", "models:/m/2", "--report", "a/b", "--json"])
    assert code == 3
    printed = json.loads(capfd.readouterr().out)
    assert sorted(path.name for path in Path("a/b").iterdir()) == ["gate.json", "gate.md", "gate.xml"]
    assert json.loads(Path("a/b/gate.json").read_text()) == printed
    assert (printed["verdict"], printed["version"], printed["off"]) == ("inconclusive", "3", ["max_ms_per_token"])
    assert printed["comparison"]["champion_gain"]["value"] == -0.02
    assert asked == [("models:/m/3", "models:/m/2")]


def deciding(monkeypatch: pytest.MonkeyPatch, decision: Decision) -> list[tuple]:
    """The flow answers with a planted decision; returns what it is asked."""
    asked: list[tuple] = []

    def decide(spec, *uris):
        asked.append(uris)
        return decision

    monkeypatch.setattr("flows.gate.gate", decide)
    return asked


def test_a_folder_that_cannot_be_made_is_reported_before_anything_runs(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    asked = deciding(monkeypatch, planted())
    Path("file").write_text("mine")
    assert main(["gate", "smoke", "--model", "models:/m/3", "--report", "file"]) == 2
    assert "cannot be made" in capfd.readouterr().err
    assert (asked, [path.name for path in tmp_path.iterdir()]) == ([], ["file"])


def test_the_markdown_is_appended_to_the_jobs_own_page(tmp_path, monkeypatch, capfd):
    page = tmp_path / "summary.md"
    page.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))
    write_decision(planted(), None)
    assert page.read_text() == f"before\n{markdown(planted())}\n"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "none" / "summary.md"))
    write_decision(planted(), None)
    assert "GITHUB_STEP_SUMMARY" in capfd.readouterr().err


def test_characters_that_utf8_cannot_hold_do_not_lose_the_report(tmp_path, monkeypatch):
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    write_decision(with_gates(gate("a", "fail", "half a pair: \ud800")), tmp_path)
    assert json.loads((tmp_path / "gate.json").read_text())["gates"][0]["why"] == "half a pair: \ud800"
    assert "half a pair: &#55296;" in (tmp_path / "gate.md").read_text()


# --- the comment --------------------------------------------------------------------------------------------


class Api(BaseHTTPRequestHandler):
    """As much of GitHub's and GitLab's comments as is used: pages, create, edit; planned failures come first."""

    def __init__(self, state: dict, *args) -> None:
        self.state = state
        super().__init__(*args)

    def answer(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        sent = json.loads(self.rfile.read(size)) if size else {}
        self.state["asked"].append((self.command, self.path, self.headers.get("Authorization")))
        planned = self.state["failures"]
        status, reply = planned.pop(0) if planned else self.work(sent)
        data = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def work(self, sent: dict) -> tuple[int, object]:
        comments, url = self.state["comments"], urlsplit(self.path)
        if self.command == "GET":
            size, page = (int(parse_qs(url.query)[name][0]) for name in ("per_page", "page"))
            return 200, comments[(page - 1) * size : page * size]
        if self.command == "POST":
            comments.append({"id": len(comments) + 1, **sent})
            return 201, comments[-1]
        (found,) = (item for item in comments if item["id"] == int(url.path.rpartition("/")[2]))
        found |= sent
        return 200, found

    do_GET = do_POST = do_PATCH = do_PUT = answer

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def api(tmp_path, monkeypatch) -> Iterator[dict]:
    """A job on pull request 7 whose API is a server on this machine; its comments, failures to come, what it was asked."""
    state: dict = {"comments": [], "failures": [], "asked": []}
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Api, state)) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        state["url"] = f"http://127.0.0.1:{server.server_port}"
        event = tmp_path / "event.json"
        event.write_text(json.dumps({"pull_request": {"number": 7, "head": {"sha": "abc1234" * 5}}}))
        for name in [name for name in os.environ if name.startswith(("GITHUB_", "CI_", "TUNEGATE_GITLAB_"))]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        netrc = tmp_path / "netrc"  # somebody's own password, which must not be sent in the token's place
        netrc.write_text("machine 127.0.0.1 login me password mine")
        monkeypatch.setenv("NETRC", str(netrc))
        given = {"TOKEN": f"{TOKEN}\n", "REPOSITORY": "o/r", "EVENT_PATH": str(event), "API_URL": state["url"]}
        for name, value in given.items():
            monkeypatch.setenv(f"GITHUB_{name}", value)
        monkeypatch.setattr(pull_request, "_RETRY", pull_request._RETRY.new(backoff_factor=0))
        yield state
        server.shutdown()


def asked(state: dict) -> list[tuple[str, str]]:
    return [(method, urlsplit(path).path) for method, path, _ in state["asked"]]


def test_a_comment_is_made_once_and_then_edited(api, capfd):
    put_comment(planted())
    put_comment(with_gates(verdict="pass"))
    (comment,) = api["comments"]
    assert comment["body"].startswith("<!-- tunegate gate tunegate-smoke -->\n**PASS**")
    assert "commit abc1234abc12" in comment["body"]
    own = "/repos/o/r/issues/7/comments"
    assert asked(api) == [("GET", own), ("POST", own), ("GET", own), ("PATCH", "/repos/o/r/issues/comments/1")]
    assert {token for *_, token in api["asked"]} == {f"Bearer {TOKEN}"}
    assert capfd.readouterr() == ("", "")


def test_a_comment_is_found_behind_a_hundred_others_and_a_quotation_is_none(api):
    mark = marker("tunegate-smoke")
    others = [{"id": n, "body": f"> {mark}" if n % 2 else None} for n in range(1, 201)]
    api["comments"] += [*others, {"id": 201, "body": f"{mark}\nold"}]
    put_comment(planted())
    assert [item["id"] for item in api["comments"] if "INCONCLUSIVE" in str(item["body"])] == [201]
    assert [method for method, _ in asked(api)] == ["GET", "GET", "GET", "PATCH"]


def test_each_model_has_its_own_comment(api):
    put_comment(planted())
    put_comment(planted(name="other--> <b>"))
    assert [item["body"].splitlines()[0] for item in api["comments"]] == [
        "<!-- tunegate gate tunegate-smoke -->",
        "<!-- tunegate gate other_____b_ -->",
    ]


def test_no_comment_goes_stale_where_two_were_made(api):
    api["comments"] += [{"id": n, "body": f"{marker('tunegate-smoke')}\nstale"} for n in (1, 2)]
    put_comment(planted())
    assert ["stale" in item["body"] for item in api["comments"]] == [False, False]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_is_transient_is_retried(api, capfd, status):
    api["failures"] += [(status, {}), (200, []), (status, {})]
    put_comment(planted())
    assert [method for method, _ in asked(api)] == ["GET", "GET", "POST", "POST"]
    assert len(api["comments"]) == 1
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("failures", "warning"),
    [
        ([(403, {"message": "Resource not accessible by integration"})], "403 Forbidden: Resource not accessible"),
        ([(500, "no json")] * 9, "500 Internal Server Error"),
        ([(200, {"odd": 1})], "ValidationError"),
    ],
)
def test_a_comment_that_fails_warns_and_decides_nothing(api, tmp_path, monkeypatch, capfd, failures, warning):
    monkeypatch.chdir(tmp_path)
    deciding(monkeypatch, planted())
    api["failures"] += failures
    assert main(["gate", "smoke", "--model", "models:/m/3", "--comment", "--json"]) == 3
    out, err = capfd.readouterr()
    assert json.loads(out)["verdict"] == "inconclusive"
    assert warning in err
    assert TOKEN not in out + err


def test_an_api_that_is_not_there_warns(api, monkeypatch, capfd):
    monkeypatch.setenv("GITHUB_API_URL", "http://127.0.0.1:1")
    monkeypatch.setattr(pull_request, "_RETRY", Retry(0))
    put_comment(planted())
    err = capfd.readouterr().err
    assert "ConnectionError" in err
    assert TOKEN not in err


def test_nothing_is_sent_without_being_asked(api, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    deciding(monkeypatch, planted())
    assert main(["gate", "smoke", "--model", "models:/m/3"]) == 3
    assert api["asked"] == []


def test_a_job_without_a_pull_request_is_warned_what_is_needed(api, tmp_path, monkeypatch, capfd):
    (tmp_path / "event.json").write_text('{"ref": "refs/heads/main"}')
    put_comment(planted())
    assert "CI_MERGE_REQUEST_IID" in capfd.readouterr().err
    assert api["asked"] == []


def test_gitlab_gets_a_note_that_is_edited(api, monkeypatch):
    monkeypatch.delenv("GITHUB_TOKEN")
    given = {"TUNEGATE_GITLAB_TOKEN": "glpat", "CI_API_V4_URL": f"{api['url']}/api/v4", "CI_PROJECT_ID": "12"}
    for name, value in (given | {"CI_MERGE_REQUEST_IID": "5"}).items():
        monkeypatch.setenv(name, value)
    put_comment(planted())
    put_comment(planted())
    own = "/api/v4/projects/12/merge_requests/5/notes"
    assert asked(api) == [("GET", own), ("POST", own), ("GET", own), ("PUT", f"{own}/1")]


def test_a_comment_that_is_too_long_loses_its_details_first():
    slices = [SliceGain(kind="source", name=f"file {n}", items=30, gain=estimate(1.0)) for n in range(2000)]
    found = planted().comparison.model_copy(update={"slices": slices})
    text = body(planted(comparison=found), "abc")
    assert len(text) < 65_536
    assert "| champion | at least -0.02 |" in text
    assert "<details>" not in text
    assert "<details>" in body(planted(), "abc")


def test_the_api_of_github_itself_is_the_default(tmp_path):
    event = tmp_path / "event.json"
    event.write_text(json.dumps({"pull_request": {"number": 7, "head": {"sha": "abc"}}}))
    thread = find_thread({"GITHUB_TOKEN": "t", "GITHUB_REPOSITORY": "o/r", "GITHUB_EVENT_PATH": str(event)})
    assert thread is not None
    assert thread.comments == "https://api.github.com/repos/o/r/issues/7/comments"


# --- what a version stands against --------------------------------------------------------------------------


def version(number: str, adapter: str, base: str = "b"):
    from data_contracts.reports import AdapterRef
    from tasks.release.registry import Registered

    return Registered(
        name="m", version=number, method="qlora", quantisation=None, adapter=AdapterRef(folder=f"/{number}", sha256=adapter),
        base_digest=base, verdict="pass", run_id="r",
    )  # fmt: skip


@pytest.fixture
def registered(monkeypatch) -> dict:
    """Versions of a registry by URI; `champion` is the one in production."""
    found: dict = {"champion": None}
    monkeypatch.setattr("tasks.release.registry.resolve", lambda store, uri, option="--model": found[uri])
    monkeypatch.setattr("tasks.release.registry.champion", lambda store, name: found["champion"])
    return found


def baseline_of(*args):
    from flows.gate import baseline_of as ask

    return ask(StoreSpec(), *args)


def test_a_version_is_compared_with_the_champion_or_the_one_named(registered):
    candidate = version("3", "c")
    assert baseline_of(candidate, None) is None
    registered |= {"champion": version("1", "a"), "models:/m/2": version("2", "b")}
    for uri, label, folder in ((None, "m version 1", "/1"), ("models:/m/2", "m version 2", "/2")):
        baseline = baseline_of(candidate, uri)
        assert (baseline.label, baseline.target.name, baseline.target.adapter.folder) == (label, "champion", folder)


def test_a_version_that_is_the_champion_itself_is_measured_against_itself_and_said_to_be(registered):
    registered["champion"] = version("3", "c")
    baseline = baseline_of(version("4", "c"), None)
    assert baseline.label == "m version 3 (the candidate itself)"
    assert baseline.target is not None


def test_a_baseline_with_a_different_base_model_is_refused_and_a_champion_there_leaves_its_number_missing(registered):
    registered |= {"champion": version("1", "a", "other"), "models:/m/1": version("1", "a", "other")}
    with pytest.raises(ConfigError, match="has a different base model than m version 3"):
        baseline_of(version("3", "c"), "models:/m/1")
    assert baseline_of(version("3", "c"), None).target is None


# --- the workflow -------------------------------------------------------------------------------------------

WORKFLOW = ROOT / ".github" / "workflows" / "evaluate.yml"
GITLAB = ROOT / "infra" / "gitlab-ci.example.yml"


def workflow() -> dict:
    return YAML(typ="safe").load(WORKFLOW)


def steps() -> list[dict]:
    (job,) = workflow()["jobs"].values()
    return job["steps"]


def scripts() -> list[str]:
    gitlab = YAML(typ="safe").load(GITLAB)["evaluate"]["script"]
    return [step["run"] for step in steps() if "run" in step] + ["\n".join(gitlab)]


def test_every_script_of_the_workflows_parses_and_takes_no_text_from_the_pull_request():
    assert len(scripts()) >= 5
    for script in scripts():
        assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False).stderr == ""
        assert "${{" not in script  # an expression in a script is text of others that bash would run


def test_every_command_of_the_workflows_is_one_that_there_is():
    from typer.main import get_command

    from flows.cli.app import app

    found = re.findall(r"tunegate (run|gate) ([^>|\n]*)", "\n".join(scripts()).replace("\\\n", " "))
    assert len(found) >= 6
    for name, arguments in found:
        get_command(app).commands[name].make_context(name, shlex.split(arguments), resilient_parsing=False)


def test_the_workflow_is_safe_for_pull_requests_from_forks():
    found = workflow()
    assert set(found["on"]) == {"pull_request"}
    assert found["permissions"] == {"contents": "read", "pull-requests": "write"}
    assert "secrets." not in WORKFLOW.read_text(encoding="utf-8")
    (checkout,) = [step for step in steps() if step.get("uses", "").startswith("actions/checkout@")]
    assert checkout["with"] == {"fetch-depth": 0, "persist-credentials": False}
    holders = [step["name"] for step in steps() if "github.token" in json.dumps(step)]
    assert holders == ["gate"]


def test_the_workflow_runs_for_what_can_change_a_model():
    paths = workflow()["on"]["pull_request"]["paths"]
    assert {"flows/**", "tasks/**", "data_contracts/**", "pyproject.toml", "constraints.txt"} <= set(paths)
    assert [path for path in paths if not (ROOT / path.removesuffix("/**")).exists()] == []
    gitlab = YAML(typ="safe").load(GITLAB)["evaluate"]["rules"][0]["changes"]
    assert set(gitlab) == {path.replace("/**", "/**/*") for path in paths} - {".github/workflows/evaluate.yml"}


def git(*args: str, cwd: Path) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@t"]
    return subprocess.run(["git", *who, *args], cwd=cwd, capture_output=True, text=True, check=True).stdout.strip()


MAKE = """#!/usr/bin/env bash
# Stands in for make: the environment exists. As `make setup` would, it gives a folder a .venv that runs its own code.
set -e
[ "$1" = -C ] && cd "$2" && shift 2
[ "$1" = setup ]
mkdir -p .venv/bin
printf '#!/bin/sh\\nexec env PYTHONPATH=%q %q "$@"\\n' "$PWD" {python} >.venv/bin/python
printf '#!/bin/sh\\nexec %q -c "import sys; from flows.cli.app import main; sys.exit(main())" "$@"\\n' \
  "$PWD/.venv/bin/python" >.venv/bin/tunegate
chmod +x .venv/bin/python .venv/bin/tunegate
"""


@pytest.fixture
def job(tmp_path, api) -> tuple[Path, dict[str, str]]:
    """A clone on a branch that changes the smoke preset, and the variables that GitHub sets."""
    work, tools = tmp_path / "work", tmp_path / "tools"
    git("clone", "--quiet", str(ROOT), str(work), cwd=tmp_path)
    git("update-ref", "refs/remotes/origin/main", "HEAD", cwd=work)
    git("switch", "--quiet", "--create", "change", cwd=work)
    preset = work / "flows" / "config" / "presets" / "smoke.yaml"
    preset.write_text(preset.read_text().replace("learning_rate: 5.0e-3", "learning_rate: 4.0e-3"))
    git("commit", "--quiet", "--all", "--message", "Slower", cwd=work)
    for folder in ("temp", "tools", "home"):
        (tmp_path / folder).mkdir()
    (tools / "make").write_text(MAKE.format(python=shlex.quote(sys.executable)))
    (tools / "make").chmod(0o755)
    clean = {n: v for n, v in os.environ.items() if not n.startswith(("PREFECT_", "MLFLOW_", "PYTEST_", "PYTHONPATH"))}
    files = {name: str(tmp_path / f"{name}.txt") for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY", "GITHUB_ENV")}
    given = {"PATH": f"{tools}:{clean['PATH']}", "HOME": str(tmp_path / "home"), "RUNNER_TEMP": str(tmp_path / "temp")}
    given |= {"GITHUB_WORKSPACE": str(work), "GITHUB_BASE_REF": "main"}
    return work, clean | files | given


def filled(value: str, environment: dict[str, str]) -> str:
    """What GitHub puts for an expression."""
    outputs = Path(environment["GITHUB_OUTPUT"])
    lines = outputs.read_text().splitlines() if outputs.exists() else []
    known = {f"steps.base.outputs.{key}": text for key, _, text in (line.partition("=") for line in lines)}
    known |= {"github.workspace": environment["GITHUB_WORKSPACE"], "github.token": TOKEN, "vars.TORCH_INDEX": ""}
    return re.sub(r"\$\{\{ *(\S+?) *\}\}", lambda match: known[match[1]], value)


def run_step(step: dict, job: tuple[Path, dict[str, str]]) -> tuple[int, str]:
    """A `run` step as GitHub runs it; `uses` steps are GitHub's own, and the cache is empty."""
    work, environment = job
    own = workflow()["jobs"]["gate"]["env"] | step.get("env", {})
    full = environment | {name: filled(str(value), environment) for name, value in own.items()}
    shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
    done = subprocess.run(shell, cwd=work, env=full, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_workflows_own_steps_gate_a_change_against_main_and_comment(job, api):
    assert workflow()["defaults"]["run"]["shell"] == "bash"
    work, environment = job
    *before, decide = [step for step in steps() if "run" in step]
    for step in before:
        code, said = run_step(step, job)
        assert code == 0, said
    assert git("rev-parse", "origin/main", cwd=work) in Path(environment["GITHUB_OUTPUT"]).read_text()
    code, said = run_step(decide, job)
    printed = json.loads((work / "gate" / "gate.json").read_text())
    assert code == {"pass": 0, "fail": 1, "inconclusive": 3}[printed["verdict"]], said
    assert printed["champion"] == "tunegate-smoke version 1"
    assert printed["version"] == "2"
    assert printed["comparison"]["champion_gain"]["value"] != 0
    assert (work / "gate" / "gate.md").read_text() in Path(environment["GITHUB_STEP_SUMMARY"]).read_text()
    assert ElementTree.parse(work / "gate" / "gate.xml").getroot().tag == "testsuites"
    again, _ = run_step(decide, job)
    assert again == code
    (comment,) = api["comments"]
    assert (work / "gate" / "gate.md").read_text() in comment["body"]
    assert TOKEN not in said
    assert git("status", "--porcelain", cwd=work) in ("", "?? gate/")
