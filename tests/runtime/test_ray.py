"""Ray works as this machine's own processes do: Ray Data on the parts of the data, Ray Train on arms; the same bytes.

Needs `pip install 'tunegate[ray]'`; skipped with this reason where it is not installed.
"""

import json
from pathlib import Path

import pytest

from data_contracts.data_spec import ContractSpec, CurateSpec, DataSpec, RulesSpec
from data_contracts.errors import TransientError, WorkerError
from data_contracts.jobs.training import TrainJob
from data_contracts.retry_table import is_transient
from data_contracts.train_spec import TrainSpec
from tasks.data.curation.curate import Curation, curate_rows
from tasks.data.ingestion.ingest import ingest_sources
from tasks.data.validation.validate import Checks, validate
from tasks.runtime.processes import run_worker
from tasks.runtime.store import Store
from tasks.training.slots import slots_of
from tests.support.arms import Place
from tests.support.faults import adapter, run_together, training_job

ray = pytest.importorskip("ray", reason="tunegate[ray] is not installed")
pytest.importorskip("ray.data", reason="tunegate[ray] is not installed")
pytest.importorskip("ray.train", reason="tunegate[ray] is not installed")


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_ray_workers_give_the_same_data_set_as_the_local_engine(tmp_path, cluster, monkeypatch):
    monkeypatch.setattr("tasks.data.ingestion.ingest.PART_ROWS", 30)
    rows = [{"prompt": f"What is {i}?", "completion": f"It is item {i * i} of the {i % 7} lists."} for i in range(120)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = {}
    for engine in ("local", "ray"):
        store = Store(tmp_path / engine)
        found = ingest_sources(store, DataSpec(source=[str(file)]))
        validated = validate(store, found, Checks(RulesSpec(), ContractSpec()), engine=engine)
        made[engine] = curate_rows(store, validated, Curation(CurateSpec(test_fraction=0.3), "m"), engine=engine)
    assert made["ray"] == made["local"]


@pytest.fixture
def on_ray(tiny_base, tmp_path, monkeypatch) -> TrainJob:
    """An arm of two workers on a Ray cluster of its own."""
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    return training_job(tiny_base, tmp_path, workers=2, engine="ray")


@pytest.mark.slow
def test_two_ray_workers_train_the_adapter_of_two_local_ones(on_ray, tmp_path):
    assert run_together(on_ray, tmp_path / "local") == [0, 0]
    report = run_worker("tasks.training.workers.train_adapter", on_ray, tmp_path / "ray")
    assert report["workers"] == 2
    assert adapter(tmp_path / "ray") == adapter(tmp_path / "local")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_arms_at_a_time_on_a_cluster_are_what_they_are_alone(tiny_base, tmp_path, prefect, cluster, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    places = {name: tmp_path / name for name in ("ray", "local")}
    for folder in places.values():
        folder.mkdir()
    together = Place(places["ray"], tiny_base).train(slots_of(TrainSpec(parallel=2, engine="ray")), engine="ray")
    alone = Place(places["local"], tiny_base).train([])
    assert max(start for start, _ in together.times) < min(end for _, end in together.times)
    assert [arm.adapter.sha256 for arm in together.arms] == [arm.adapter.sha256 for arm in alone.arms]
    assert [(arm.side_by_side, arm.threads) for arm in together.arms] == [(2, 1)] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("break_down", WorkerError, "rank 1: RuntimeError: shapes do not fit"),
        ("die", TransientError, "Ray ended it: .*resumes from its last checkpoint"),
    ],
)
def test_a_rank_that_raises_is_not_retried_and_one_that_dies_is(on_ray, tmp_path, monkeypatch, fault, error, message):
    monkeypatch.setenv("TUNEGATE_FAULT", f"1:4:{fault}")
    with pytest.raises(error, match=f"(?s){message}") as ended:
        run_worker("tests.support.faulty_rank", on_ray, tmp_path / "ray")
    assert is_transient(ended.value) == (error is TransientError)
