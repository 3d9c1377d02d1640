"""A finished run as JSON and as a page, from one planted report."""

import io
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from data_contracts.data_reports import DatasetManifest, Drift, FileRef, Repaired
from data_contracts.reports import (
    AdapterRef,
    BaseModelRef,
    EvalReport,
    LoadedBack,
    LossPoint,
    MeasuredMemory,
    ModelVersion,
    PlannedMemory,
    Quantisation,
    RecordedRun,
    RunReport,
    SampleAnswer,
    Stage,
    TaskScore,
    TrainReport,
)
from data_contracts.run_spec import RunSpec, StoreSpec
from data_contracts.verdict import (
    Claim,
    Comparison,
    Decision,
    Flips,
    GateReport,
    GateResult,
    SliceGain,
    TaskChange,
)
from flows.cli.app import main
from flows.cli.output import Outcome, print_outcome
from flows.cli.pages.data import show_dataset
from flows.cli.pages.payloads import summary
from flows.cli.pages.tables import show_comparison
from flows.cli.pages.verdict import deciding_gates, show_decision, show_run
from tasks.reporting.finished_runs import report_file
from tasks.reporting.plots import memory_plot
from tasks.reporting.tables import memory_parts
from tasks.runtime.store import Store
from tests.support.planted import comparison, estimate


def ref(path: str) -> FileRef:
    return FileRef(path=path, sha256="0" * 64)


def dataset() -> DatasetManifest:
    files = {name: ref(f"data/{name}.parquet") for name in ("train", "validation", "test")}
    return DatasetManifest(
        snapshot_id="5" * 64,
        rows_in=100,
        kept=90,
        quarantined=4,
        duplicates=6,
        exact_duplicates=4,
        near_duplicates=2,
        reasons={"empty_answer": 3, "unparsable": 1},
        flags={"refusal": 2},
        repairs={"spaces": Repaired(rows=5, examples=["a[0].jsonl:4 'a  b' -> 'a b'"])},
        languages={"en": 80, "?": 10},
        drift=Drift(reference="6" * 64, values={"ks_prompt_chars": 0.125}),
        contamination={"test": 1},
        splits={"train": 70, "validation": 5, "test": 15},
        known_rows=0,
        **files,
        quarantine=ref("data/quarantine.jsonl"),
        duplicate_rows=ref("data/duplicates.parquet"),
        contract_result=ref("data/contract.json"),
        data_docs="data/docs/index.html",
    )


def arm(method: str, weights: int) -> TrainReport:
    return TrainReport(
        name=method,
        arm=method,
        method=method,
        seed=17,
        adapter=AdapterRef(folder=f"adapters/{method}", sha256=method * 8),
        step0_sha256="same",
        quantisation=None if method == "lora" else Quantisation(quant_type="nf4", double_quant=True),
        steps=10,
        resumed_from_step=0,
        train_rows=70,
        rows_too_long=1,
        too_long="left out",
        train_tokens=5000,
        completion_tokens=2000,
        trainable_parameters=4_884_480,
        weights_bytes=weights,
        peak_rss_bytes=1_500_000_000,
        peak_train_bytes=1_400_000_000,
        predicted_train_bytes=1_500_000_000 if method == "lora" else None,
        measured_memory=MeasuredMemory(
            process=500_000_000, weights=weights, adapters=20_000_000, optimiser=40_000_000, rest=840_000_000 - weights
        ),
        gradients_bytes=20_000_000,
        seconds=130.0,
        train_seconds=120.0,
        useful_tokens_per_s=16.7,
        final_validation_nll_nats=2.5,
        validation=[],
        best_step=None,
        stopped_early=False,
        micro_batches=1,
        loss=[LossPoint(step=1, loss_nats=4.0, learning_rate=1e-4, seconds=12.0)],
        precision="fp32",
        precision_reason="no bf16",
        threads=2,
        threads_reason="2 of 2 cores are free",
        batch="4.0 rows and 900 tokens a step",
        batch_reason="train.batch_tokens=1024 holds no more",
        device_reason="torch is built without CUDA",
        scoring="packed",
        scoring_reason="losses equal the padded forward's",
        device="cpu",
    )


def scores(target: str, nll: float) -> EvalReport:
    return EvalReport(
        target=target,
        adapter_sha256=None if target == "base" else target * 8,
        items_sha256="i",
        nll_nats=nll,
        bits_per_byte=nll / 4,
        accuracy=0.55,
        accuracy_interval=(0.5, 0.6),
        lexical_baseline_accuracy=0.57,
        items=15,
        scores=[TaskScore(task="domain_generate", metric="stopped", value=0.75, items=8)],
        samples=ref(f"samples/{target}.jsonl"),
        facts=ref(f"samples/{target}.facts.jsonl"),
        answers=[SampleAnswer(question="What is `[b]x[/b]`?", reference="A ref.", answer=f"{target} says so.")],
        ms_per_token=41.0,
        seconds=3.0,
    )


def planted(root: Path, run_id: str = "20261124-abc", aliases: list[str] | None = None) -> RunReport:
    gates = [
        GateResult(
            name="retention", direction="at least", threshold=0.8, actual=0.9, interval=(0.85, 0.95), verdict="pass", why="kept"
        )
    ]  # fmt: skip
    measured = comparison(
        "qlora", 15, 14,
        nll_nats={"base": 4.0, "lora": 2.0, "qlora": 2.2}, bits_per_byte={"base": 1.0, "lora": 0.5, "qlora": 0.55},
        gains={"lora": estimate(2.0, 0.1), "qlora": estimate(1.8, 0.1)}, gain=estimate(1.8, 0.1),
        accuracy={"base": 0.5, "lora": 0.6, "qlora": 0.6}, retention=estimate(0.9), accuracy_drop=estimate(0.0, 0.02),
        flips=Flips(lost=1, won=2, rate=0.2, p=1.0), stop_rate=estimate(0.75, 0.1),
        slices=[SliceGain(kind="source", name="a[0].jsonl", items=8, gain=estimate(1.5, 0.3))],
        general=[
            TaskChange(
                task="general_piqa", metric="accuracy", items=200, base=0.6, candidate=0.58, change=estimate(-0.02, 0.03), p=0.4
            )
        ],
        forms={"full": estimate(0.01, 0.005)}, memory_saving=estimate(0.2, 0.0), weights_saving=0.75,
        speed_ratio=estimate(float("nan"), 0.0), detectable={"retention": 0.08},
        claims=[Claim(claim="keeps 99 % of the quality", source="s", measured=None, verdict="does not hold", note="+90.0%")],
    )  # fmt: skip
    return RunReport(
        run_id=run_id,
        spec=RunSpec(store=StoreSpec(root=str(root))).model_dump(mode="json"),
        dataset=dataset(),
        base=BaseModelRef(
            name="builtin:x",
            digest="d",
            path="bases/d",
            note="dequantised Q4_1",
            revision=None,
            stops=[],
            chat_template=None,
        ),
        arms=[arm("lora", 500_000_000), arm("qlora", 125_000_000)],
        evaluations=[scores("base", 4.0), scores("lora", 2.0), scores("qlora", 2.2)],
        comparison=measured,
        gate=GateReport(gates=gates, off=["max_ms_per_token is null"], verdict="pass"),
        recorded=RecordedRun(mlflow_run_id=f"mlflow-{run_id}", arm_run_ids={"lora": "child-l", "qlora": "child-q"}),
        model=ModelVersion(name="m", version="1", aliases=["champion"] if aliases is None else aliases, run_id="r"),
        loaded_back=LoadedBack(question="q", answer="a", as_evaluated=True),
        stages=[Stage(name="ingest", status="cached", seconds=0.1), Stage(name="train", status="ran", seconds=120)],
        html=f"runs/{run_id}/report.html",
    )


def saved(report: RunReport, root: Path, age_seconds: int = 0) -> None:
    path = report_file(Store(root), report.run_id)
    path.parent.mkdir(parents=True)
    path.write_text(report.model_dump_json())
    then = path.stat().st_mtime - age_seconds
    os.utime(path, (then, then))


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


# --- plots, and runs compared -------------------------------------------------------------------------------


def test_each_bar_of_memory_is_the_peak_part_by_part():
    parts = {
        "process": 7,
        "weights": 500,
        "adapters": 20,
        "optimiser": 40,
        "gradients": 20,
        "activations": 60,
        "logits": 9,
    }
    lora = arm("lora", 500_000_000).model_copy(update={"planned_memory": PlannedMemory(**parts)})
    (axes,) = memory_plot([lora, arm("qlora", 125_000_000)]).axes
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        "lora, measured",
        "lora, planned",
        "qlora, measured",
    ]
    ends = [max(part[bar].get_x() + part[bar].get_width() for part in axes.containers) for bar in range(3)]
    assert ends == pytest.approx([1.4, sum(parts.values()) / 1e9, 1.4])
    older = arm("lora", 500_000_000).model_copy(update={"measured_memory": None})
    assert memory_parts(older) == {"measured": {"weights": 500_000_000, "rest": 900_000_000}}


def test_a_champion_is_compared_with_the_candidate(tmp_path, capfd):
    found = planted(tmp_path).comparison
    found = found.model_copy(update={"champion_gain": estimate(0.1)})
    print_outcome(Outcome({}, lambda page: show_comparison(found, page)), sys.stdout, as_json=False)
    assert "QLoRA lowers held-out loss against champion by 0.100 [0.050, 0.150]" in capfd.readouterr().out


def test_a_version_that_is_not_in_production_is_asked_by_number(tmp_path, capfd):
    assert "--model models:/m/1" in page_of(planted(tmp_path, aliases=["challenger"]), capfd)


def test_compare_shows_the_newest_run_or_the_one_named(tmp_path, capfd):
    saved(planted(tmp_path, "run-old"), tmp_path, age_seconds=100)
    saved(planted(tmp_path, "run-new"), tmp_path)
    store = ["--set", f"store.root={tmp_path}", "--json"]
    for args, expected in (([], "run-new"), (["--run", "run-old"], "run-old"), (["--run", "mlflow-run-o"], "run-old")):
        assert main(["compare", *args, *store]) == 0
        payload = json.loads(capfd.readouterr().out)
        assert payload["run_id"] == expected
        assert payload["comparison"]["speed_ratio"]["value"] is None
    assert main(["compare", "--run", "run", *store]) == 2
    assert "2 runs begin with 'run'" in capfd.readouterr().err
    assert main(["compare", "--run", "other", *store]) == 2
    assert "no run is called 'other'" in capfd.readouterr().err


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


def test_a_store_that_was_moved_is_read_where_it_is(tmp_path, capfd):
    saved(planted(Path("/where/it/was")), tmp_path)
    assert main(["compare", "--set", f"store.root={tmp_path}", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["report"].startswith(str(tmp_path))


def test_a_broken_report_is_an_infrastructure_failure(tmp_path, capfd):
    path = report_file(Store(tmp_path), "r")
    path.parent.mkdir(parents=True)
    path.write_text("{")
    assert main(["compare", "--set", f"store.root={tmp_path}"]) == 4
    assert "no readable run report" in capfd.readouterr().err


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
