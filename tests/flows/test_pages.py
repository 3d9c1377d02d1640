"""A finished run as JSON and as a page, from one planted report."""

import io
import json
import os
import re
import sys
from collections.abc import Callable

import pytest
from rich.console import Console

from data_contracts.reports import RunReport, Stage
from data_contracts.verdict import Comparison, Decision, GateReport, GateResult
from flows.cli.app import main
from flows.cli.output import Outcome, print_outcome
from flows.cli.pages.data import show_dataset
from flows.cli.pages.payloads import summary
from flows.cli.pages.tables import show_comparison
from flows.cli.pages.verdict import deciding_gates, show_decision, show_run
from tasks.reporting.finished_runs import report_file
from tasks.runtime.store import Store
from tests.support.planted import comparison, dataset, estimate, planted, saved


def page_of(report: RunReport, capfd: pytest.CaptureFixture[str], details: bool = False) -> str:
    print_outcome(Outcome({}, lambda page: show_run(report, page, details=details)), sys.stdout, as_json=False)
    return capfd.readouterr().out


def rendered(show: Callable[[Console], None], width: int) -> list[str]:
    console = Console(record=True, width=width, file=io.StringIO(), highlight=False)
    show(console)
    return console.export_text().splitlines()


def test_the_summary_holds_what_scripts_were_promised(tmp_path):
    payload = summary(planted(tmp_path))
    assert {"run_id", "mlflow_run_id", "snapshot", "arms", "comparison", "gates", "verdict", "model", "stages"} <= set(
        payload
    )
    assert {"id", "rows_in", "kept", "quarantined", "duplicates", "splits"} <= set(payload["snapshot"])
    (lora, qlora) = payload["arms"]
    assert {"method", "seed", "step0_sha256", "weights_bytes", "peak_rss_bytes", "train_tokens"} <= set(lora)
    assert {"useful_tokens_per_s", "seconds"} <= set(lora)
    assert (lora["adapter_sha256"], qlora["adapter_sha256"]) == ("lora" * 8, "qlora" * 8)
    assert (lora["mlflow_run_id"], qlora["mlflow_run_id"]) == ("child-l", "child-q")
    assert (lora["eval"]["nll_nats"], qlora["eval"]["nll_nats"], payload["base"]["eval"]["nll_nats"]) == (2.0, 2.2, 4.0)
    assert {"retention", "gain", "memory_saving", "speed_ratio"} <= set(payload["comparison"])
    assert set(payload["comparison"]["retention"]) >= {"value", "low", "high"}
    assert set(payload["gates"][0]) == {"name", "direction", "threshold", "actual", "interval", "verdict", "why"}
    assert {"name", "version", "aliases"} <= set(payload["model"])
    assert payload["stages"][0] == {"name": "ingest", "status": "cached", "seconds": 0.1, "why": ""}


def test_the_details_set_the_models_side_by_side_below_the_screen(tmp_path, capfd):
    text = page_of(planted(tmp_path), capfd, details=True)
    assert text.index("where to look next") < text.index("run 20261124-abc: builtin:x")
    loss = next(line for line in text.splitlines() if "held-out loss" in line)
    assert [part for part in loss.replace("│", " ").split() if part[0].isdigit()] == ["4.000", "2.000", "2.200"]
    lines = iter(text.splitlines())
    peak, planned = next((line, next(lines)) for line in lines if "peak memory in" in line)
    assert [part.strip() for part in peak.split("│")[3:5]] == ["1.40 GB", "1.40 GB"]
    assert [part.strip() for part in planned.split("│")[3:5]] == ["1.50 GB", "-"]
    assert "QLoRA keeps 90.0% [85.0%, 95.0%] of LoRA's loss gain" in text
    assert "LoRA lowers held-out loss against base by 2.000 [1.900, 2.100] nats/token" in text
    assert re.search(r"keeps 99 % of the quality +│ does not hold", text)
    assert "source: a[0].jsonl" in text
    assert re.search(
        r"general_piqa +│ accuracy +│ +200 +│ +0.600 +│ +0.580 +│ -0.020 \[-0.050, \+0.010\] +│ +0.400", text
    )
    assert "served on the full-precision base, its loss changes by +0.0100" in text
    assert "not judged: max_ms_per_token is null" in text
    assert "verdict: PASS" in text
    assert "registered: m version 1 (champion)" in text
    assert "What is `[b]x[/b]`?" in text
    assert "qlora says so." in text
    assert f"tunegate ui --set store.root={tmp_path}" in text
    assert "--model models:/m@champion" in text


# --- one screen ---------------------------------------------------------------------------------------------

WIDTHS = (80, 120)
MOST_LINES = 40
FAILED = GateResult(
    name="candidate_beats_base", direction="more than", threshold=0.0, actual=-0.1, interval=(-0.2, -0.05), verdict="fail",
    why="loss of the untuned base minus the candidate's, nats per token: the whole interval is not more than 0",
)  # fmt: skip
UNDECIDED = GateResult(
    name="qlora_keeps_loras_gain", direction="at least", threshold=0.9, actual=0.91, interval=(0.85, 0.97), verdict="inconclusive",
    why="share of LoRA's loss gain that QLoRA keeps: the interval holds 0.9; if it is as measured, about 1,240 items decide it "
    "(now 420)",
)  # fmt: skip
MISSING = GateResult(
    name="qlora_keeps_accuracy", direction="at most", threshold=0.1, actual=None, interval=None, verdict="fail",
    why="LoRA's accuracy minus QLoRA's: the number is missing, and a missing number never passes",
)  # fmt: skip
FIRST_RUN = GateResult(
    name="not_worse_than_champion", direction="", threshold=None, actual=None, interval=None, verdict="pass",
    why="first-run rule: no other version is in production, so beating the base decides",
)  # fmt: skip


def judged(report: RunReport, verdict: str, *more: GateResult) -> RunReport:
    gates = [*report.gate.gates, FIRST_RUN, *more]
    return report.model_copy(update={"gate": GateReport(gates=gates, off=[], verdict=verdict)})


def screens(report: RunReport) -> list[list[str]]:
    """At each width, without trailing spaces. Only paths and commands are wider than the screen."""
    found = [rendered(lambda page: show_run(report, page, seconds=845.0), width) for width in WIDTHS]
    for width, lines in zip(WIDTHS, found, strict=True):
        assert len(lines) <= MOST_LINES
        place = lines.index("where to look next")
        assert [line for line in lines[:place] if len(line) > width] == []
        assert not any("…" in line for line in lines)
    return found


def test_a_pass_is_one_screen_that_begins_with_the_verdict_and_ends_with_what_to_do(tmp_path):
    for lines in screens(judged(planted(tmp_path), "pass")):
        assert lines[0] == "PASS  m version 1 may be released"
        assert "what decided it: all 2 gates passed" in lines
        assert "  pass  retention                0.900 [0.850, 0.950]  at least 0.800" in lines
        assert any(re.fullmatch(r"  pass  not_worse_than_champion  - +first-run rule", line) for line in lines)
        assert "  quality kept  90.0% [85.0%, 95.0%]  QLoRA's share of LoRA's loss gain" in lines
        assert any(line.startswith("  memory saved  20.0% (one seed)") for line in lines)
        assert any(line.startswith("  speed         - not measured") for line in lines)
        assert "registered: m version 1 (champion)" in lines
        assert "took 14 min 5 s; longest: train 2 min" in lines
        last = "\n".join(lines[-4:])
        for part in (
            "report.html",
            "tunegate compare --set",
            f"tunegate ui --set store.root={tmp_path}",
            "models:/m@champion",
        ):
            assert part in last


def test_a_fail_names_the_gates_that_failed_with_their_reasons(tmp_path):
    for lines in screens(judged(planted(tmp_path, aliases=["challenger"]), "fail", FAILED, UNDECIDED, MISSING)):
        text = "\n".join(lines)
        assert lines[0] == "FAIL  m version 1 must not be released"
        assert "what decided it: 2 failed, 1 inconclusive, 2 passed of 5 gates" in lines
        assert "  fail  candidate_beats_base  -0.100 [-0.200, -0.050]  more than 0.000" in lines
        assert re.search(r"  fail  qlora_keeps_accuracy  - +at most 0.100", text)
        assert "a missing number never passes" in " ".join(text.split())
        assert "  inconclusive: qlora_keeps_loras_gain" in lines
        assert "0.900 [0.850, 0.950]" not in text
        assert "registered: m version 1 (challenger)" in lines


def test_an_inconclusive_run_says_what_would_decide_it(tmp_path):
    for lines in screens(judged(planted(tmp_path), "inconclusive", UNDECIDED)):
        assert lines[0] == "INCONCLUSIVE  m version 1 cannot be decided yet"
        assert "  inconclusive  qlora_keeps_loras_gain  0.910 [0.850, 0.970]  at least 0.900" in lines
        assert "about 1,240 items decide it (now 420)" in " ".join(" ".join(lines).split())


def test_many_gates_and_long_reasons_still_fit_one_screen(tmp_path):
    long = FAILED.model_copy(update={"why": f"{'a reason of many words ' * 20}about 7 seeds decide it (now 3)"})
    many = [long.model_copy(update={"name": f"keeps_general_task_{number}"}) for number in range(9)]
    undecided = [UNDECIDED.model_copy(update={"name": f"keeps_{'word_' * 4}{number}"}) for number in range(20)]
    for lines in screens(judged(planted(tmp_path), "fail", *many, *undecided)):
        assert "  and 5 more, see the tables" in lines
        assert "about 7 seeds decide it (now 3)" in " ".join(" ".join(lines).split())
    passed = [FIRST_RUN.model_copy(update={"name": f"gate_{number}"}) for number in range(30)]
    for lines in screens(judged(planted(tmp_path), "pass", *passed)):
        assert "  and 20 more, see the tables" in lines


def test_without_gates_the_screen_says_why_it_is_a_fail(tmp_path):
    nothing = planted(tmp_path).model_copy(
        update={"gate": GateReport(gates=[], off=["min_retention is null"], verdict="fail")}
    )
    for lines in screens(nothing):
        assert lines[0].startswith("FAIL  ")
        assert "what decided it: all gates are off: an unjudged version fails" in lines


def test_without_a_lora_arm_the_screen_measures_against_the_base(tmp_path):
    alone = comparison("qlora", 15, 14, nll_nats={"base": 4.0, "qlora": 2.2}, gain=estimate(1.8, 0.1))
    for lines in screens(planted(tmp_path).model_copy(update={"comparison": alone, "arms": [], "evaluations": []})):
        assert any(
            re.fullmatch(r"  loss below the base's +1.800 \[1.700, 1.900\]  nats per token", line) for line in lines
        )
        assert sum("- not measured" in line for line in lines) == 2
        assert 'predict "your question"' in lines[-1]


def test_a_run_that_found_everything_done_says_so_below_its_verdict(tmp_path):
    cached = [Stage(name="ingest", status="cached", seconds=0.1)]
    for lines in screens(planted(tmp_path).model_copy(update={"stages": cached})):
        assert lines[0].startswith("PASS  ")
        assert "nothing to do: every stage was done before" in " ".join(lines)


def test_details_is_an_option_of_the_command_and_json_has_no_use_for_it(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr("flows.retrain.retrain", lambda spec, force: planted(tmp_path))
    command = ["run", "smoke", "--set", f"store.root={tmp_path}"]
    assert main(command) == 0
    screen = capfd.readouterr().out
    assert screen.startswith("PASS  m version 1 may be released\n")
    assert len(screen.splitlines()) <= MOST_LINES
    assert main([*command, "--details"]) == 0
    tables = capfd.readouterr().out
    assert "claims about QLoRA, checked against this run" in tables
    assert "claims about QLoRA, checked against this run" not in screen
    assert main([*command, "--details", "--json"]) == 0
    assert list(json.loads(capfd.readouterr().out)) == list(summary(planted(tmp_path)))


def decision(found: Comparison, verdict: str, champion: str | None, *gates: GateResult) -> Decision:
    report = GateReport(gates=list(gates), off=[], verdict=verdict)
    return Decision(model="models:/m/3", name="m", version="3", champion=champion, gate=report, comparison=found)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_gate_decision_is_one_screen_too(tmp_path, width):
    found = comparison(
        "candidate", 400, 390, nll_nats={}, gain=estimate(1.2), champion_gain=estimate(-0.02), stop_rate=estimate(0.9)
    )
    failed = decision(found, "fail", "m version 2", FAILED)
    lines = rendered(lambda page: show_decision(failed, "mlruns", page), width)
    assert lines[:2] == ["FAIL  m version 3 must not be released", "  compared with m version 2, 400 held-out items"]
    assert len(lines) <= MOST_LINES
    assert "what decided it: 1 failed of 1 gate" in lines
    assert any("-0.020 [-0.070, 0.030]" in line for line in lines)
    assert lines[-1].endswith("the same command with --details")
    passed = decision(found, "pass", None, FIRST_RUN)
    lines = rendered(lambda page: show_decision(passed, "else where", page, details=True), width)
    assert "  no other version is in production, 400 held-out items" in lines
    assert "tunegate promote m --version 3 --set 'store.root=else where'" in "\n".join(lines)
    assert lines[-1] == "verdict: PASS"


def test_the_deciding_gates_are_those_with_the_verdict_of_the_whole(tmp_path):
    report = judged(planted(tmp_path), "inconclusive", UNDECIDED).gate
    assert [gate.name for gate in deciding_gates(report)] == ["qlora_keeps_loras_gain"]


# --- runs compared -----------------------------------------------------------------------------------------


def test_a_champion_is_compared_with_the_candidate(tmp_path, capfd):
    found = planted(tmp_path).comparison
    found = found.model_copy(update={"champion_gain": estimate(0.1)})
    print_outcome(Outcome({}, lambda page: show_comparison(found, page)), sys.stdout, as_json=False)
    assert "QLoRA lowers held-out loss against champion by 0.100 [0.050, 0.150]" in capfd.readouterr().out


def test_a_version_that_is_not_in_production_is_asked_by_number(tmp_path, capfd):
    assert "--model models:/m/1" in page_of(planted(tmp_path, aliases=["challenger"]), capfd)


def test_runs_are_set_side_by_side_and_compared_where_they_answered_the_same_items(tmp_path, capfd):
    lines = [
        json.dumps({"task": "domain_nll", "metric": "nll_nats", "row_id": str(i), "value": 2.0, "tokens": 2})
        for i in range(9)
    ]
    fact = {"cluster": "c", "bytes": 8, "source": "s", "language": "en", "length": "short"}
    for name, nll in (("run-a", 2.0), ("run-b", 1.5)):
        report = planted(tmp_path, name)
        saved(report, tmp_path)
        own = next(item for item in report.evaluations if item.target == "qlora")
        samples = report_file(Store(tmp_path), name).with_name("samples.jsonl")
        samples.write_text("\n".join(lines).replace("2.0", str(2 * nll)))
        facts = samples.with_name("facts.jsonl")
        facts.write_text("\n".join(json.dumps({"row_id": str(i), **fact, "cluster": str(i)}) for i in range(9)))
        files = {"samples": Store(tmp_path).ref(samples), "facts": Store(tmp_path).ref(facts)}
        evaluations = [own.model_copy(update=files), *(e for e in report.evaluations if e is not own)]
        report_file(Store(tmp_path), name).write_text(
            report.model_copy(update={"evaluations": evaluations}).model_dump_json()
        )
    store = ["--set", f"store.root={tmp_path}"]
    assert main(["compare", "--run", "run-a", "--run", "run-b", *store, "--json"]) == 0
    payload = json.loads(capfd.readouterr().out)
    assert payload["against_first"][1]["value"] == pytest.approx(0.5)
    assert main(["compare", "--run", "run-a", "--run", "run-b", *store]) == 0
    assert "+0.500 [+0.500, +0.500]" in capfd.readouterr().out
    assert main(["compare", "--run", "no-such", "--run", "run-b", "--run", "nor-this", *store]) == 2
    errors = capfd.readouterr().err
    assert "no-such" in errors
    assert "nor-this" in errors


def test_data_shows_every_reason_with_examples_by_file_and_line(tmp_path, capfd):
    store = Store(tmp_path)
    reasons = [(3, "empty_answer", "0 characters"), (9, "unparsable", "Expecting ','"), (5, "empty_answer", "")]
    rows = [{"source": "a[0].jsonl", "line": line, "reason": why, "detail": text} for line, why, text in reasons]
    results = [{"name": "rows", "success": True}, {"name": "short answers", "success": False}]
    quarantine, contract = store.files / dataset().quarantine.path, store.files / dataset().contract_result.path
    quarantine.parent.mkdir(parents=True)
    quarantine.write_text("".join(json.dumps(row) + "\n" for row in rows))
    contract.write_text(json.dumps({"results": results}))
    print_outcome(Outcome({}, lambda page: show_dataset(dataset(), [], store, page)), sys.stdout, as_json=False)
    text = capfd.readouterr().out
    assert "a[0].jsonl:3 0 characters" in text
    assert "a[0].jsonl:9 Expecting ','" in text
    assert "2 expectations, 1 of them only warn: short answers" in text
    assert text.index("empty_answer") < text.index("unparsable")
    for part in ("a[0].jsonl:4 'a  b' -> 'a b'", "refusal", "ks_prompt_chars 0.125", "en 88.9%", "test 1"):
        assert part in text
