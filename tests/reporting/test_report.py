"""What a report shows is what was measured, and finished runs are found again.

Run: pytest tests/reporting/test_report.py
"""

import json
from pathlib import Path

import pytest

from data_contracts.reports import PlannedMemory
from flows.cli.app import main
from tasks.reporting.finished_runs import report_file
from tasks.reporting.plots import memory_plot
from tasks.reporting.tables import memory_parts
from tasks.runtime.store import Store
from tests.support.planted import arm, planted, saved

# --- plots --------------------------------------------------------------------------------------------------


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


# --- finished runs ------------------------------------------------------------------------------------------


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
