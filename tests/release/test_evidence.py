"""A version carries the evidence it is trusted for, and can be made again from it.

Data stages, training, registry and ledger are real; the base is tiny, workers run in this process, scores are planted.
The whole chain and the command: `pytest -m slow tests/release/test_evidence.py`.
"""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from huggingface_hub import ModelCard
from prefect.settings import PREFECT_API_URL, temporary_settings

from data_contracts.data_reports import DatasetManifest
from data_contracts.errors import ConfigError, DataError, StoreError
from data_contracts.lineage import LINEAGE_TAG, Judgement, Lineage, Reproduction, result_of
from data_contracts.releases import KeptDecision
from data_contracts.reports import BaseModelRef, ModelVersion, RecordedRun, TrainReport
from data_contracts.run_spec import RunSpec
from data_contracts.stage_inputs import RunResult, TrainInputs
from data_contracts.train_spec import arms_of
from flows.reproduce import reproduce_flow, reproduction_spec
from tasks.data.curation import row_ledger as ledger
from tasks.data.curation.curate import Curation, curate_rows
from tasks.data.ingestion.ingest import ingest_sources
from tasks.data.ingestion.licences import data_licence
from tasks.data.validation.validate import Checks, validate
from tasks.models.base import init_adapter, start_settings
from tasks.release import lineage as lineages
from tasks.release import registry
from tasks.release.lineage import Registration
from tasks.release.register import register_version
from tasks.runtime.mlflow_client import connect, open_experiment
from tasks.runtime.processes import Launch
from tasks.runtime.store import Store, digest, without_place
from tasks.training.train import train_arm
from tests.support.curated import facts
from tests.support.curated import run as split_rows
from tests.support.planted import planted, scores

pytestmark = pytest.mark.filterwarnings("ignore")
NAME = "proven"
URI = f"models:/{NAME}/1"
SETTINGS = {
    "methods": ["lora"], "rank": 4, "alpha": 8, "learning_rate": 1e-2, "max_steps": 3, "batch_tokens": 512,
    "max_tokens": 256, "threads": 1,
}  # fmt: skip


class Place:
    """One version, made for real but for its scores."""

    def __init__(self, root: Path, base: Path):
        self.root, self.store = root, Store(root / "store")
        (self.store.files / "bases").mkdir(parents=True)
        (self.store.files / "bases" / "tiny").symlink_to(base)
        self.base = BaseModelRef(
            name="/home/somebody/models/tiny", digest=digest(base), path="bases/tiny", note="", revision=None, stops=["</s>"],
            chat_template=None, licence="MIT",
        )  # fmt: skip
        self.rows = root / "rows.jsonl"
        self.rows.write_text("".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in facts(80)))
        self.spec = RunSpec.model_validate(
            {
                "data": {"source": [str(self.rows)], "licence": "CC-BY-4.0"},
                "curate": {"test_fraction": 0.2, "validation_fraction": 0.1},
                "model": {"name": NAME, "base": self.base.name}, "train": SETTINGS, "store": {"root": str(self.store.root)},
            }
        )  # fmt: skip
        self.data = self.split()
        self.arm = self.trained()
        self.made = self.everything()
        self.version = register_version(self.made)
        self.files = registry.resolve(self.spec.store, URI).artifacts

    def split(self) -> DatasetManifest:
        snapshot = ingest_sources(self.store, self.spec.data)
        validated = validate(self.store, snapshot, Checks(self.spec.rules, self.spec.contract))
        return curate_rows(self.store, validated, Curation(self.spec.curate, NAME))

    def trained(self) -> TrainReport:
        (own,) = arms_of(self.spec.train)
        step0 = init_adapter(self.store, self.base, start_settings("lora", 17, own.settings, "fp32"))
        inputs = TrainInputs(
            method="lora", seed=17, base=self.base, step0=step0, rows=self.data.train, validation=self.data.validation,
            settings=own.settings, precision="fp32",
        )  # fmt: skip
        return train_arm(self.store, "train-" + "0" * 16, inputs, Launch("train lora"))

    def everything(self) -> Registration:
        import mlflow

        client = connect(self.spec.store)
        open_experiment(client, self.spec.store, NAME)
        with mlflow.start_run() as run:
            pass
        samples = self.root / "store" / "store" / "samples.jsonl"
        samples.write_text('{"task": "domain_nll", "metric": "nll_nats", "row_id": "a", "value": 2.0, "tokens": 3}\n')
        own = {"samples": self.store.ref(samples), "facts": self.store.ref(samples)}
        found = planted(self.store.root)
        result = RunResult(
            base=self.base, dataset=self.data, candidate=self.arm, arms=[self.arm],
            evaluations=[scores("base", 4.0), scores("lora", 2.0).model_copy(update=own)],
            comparison=found.comparison.model_copy(update={"candidate": "lora", "released": "lora"}), gate=found.gate,
            champion=None,
        )  # fmt: skip
        recorded = RecordedRun(mlflow_run_id=run.info.run_id, arm_run_ids={"lora": run.info.run_id})
        return Registration(self.spec, result, recorded, key="register-1", code="c" * 64)

    @property
    def lineage(self) -> Lineage:
        return Lineage.model_validate_json((self.files / "evidence" / "lineage.json").read_bytes())

    def again(self, *changes: str, root: str | None = None) -> Reproduction:
        store = self.spec.store if root is None else self.spec.store.model_copy(update={"root": root})
        spec, threads = reproduction_spec(store, URI, [f"store.root={store.root}", *changes])
        found: Reproduction = reproduce_flow.fn(spec, URI, threads)
        return found


@pytest.fixture(scope="module", autouse=True)
def workers_here() -> Iterator[None]:
    functions = {
        "train_adapter": "train", "evaluate_models": "evaluate_models", "compare_adapters": "compare",
        "init_adapter": "make_step0", "prepare_base": "prepare",
    }  # fmt: skip

    def here(module: str, spec: dict, out: Path, *_: Any, **__: Any) -> Any:
        out.mkdir(parents=True, exist_ok=True)
        return getattr(import_module(module), functions[module.rpartition(".")[2]])(spec, out)

    # The server of a test file before this one is not for these: the flow's function is called without a run of Prefect.
    with pytest.MonkeyPatch.context() as patch, temporary_settings({PREFECT_API_URL: None}):
        patch.setattr("tasks.runtime.partitions.free_cores", lambda: 1)
        for user in ("models.base", "training.train", "evaluation.evaluate", "reproduction.reproduce"):
            patch.setattr(f"tasks.{user}.run_worker", here)
        yield


@pytest.fixture(scope="module")
def place(tiny_base, tmp_path_factory, workers_here) -> Place:
    return Place(tmp_path_factory.mktemp("evidence"), tiny_base)


# --- what it carries ----------------------------------------------------------------------------------------


def test_a_version_carries_everything_it_was_judged_by(place):
    found = {path.relative_to(place.files).as_posix() for path in place.files.rglob("*") if path.is_file()}
    assert found >= {
        "adapter/adapter_model.safetensors", "adapter/adapter_config.json", "meta.json", "trained_rows.txt",
        *(f"evidence/{name}" for name in (
            "lineage.json", "gate.json", "comparison.json", "evaluation.json", "dataset.json", "training.json", "contract.json",
            "spec.yaml", "items/samples.jsonl", "items/facts.jsonl", "README.md", "figures/quality.png", "environment.txt",
            "sbom.cdx.json",
        )),
    }  # fmt: skip
    assert place.lineage.files == {name: digest(place.files / name) for name in found - {"evidence/lineage.json"}}


def test_its_tag_names_the_lineage_and_the_run_has_the_same(place, tmp_path):
    client = connect(place.spec.store)
    tags = client.get_model_version(NAME, "1").tags
    assert tags[LINEAGE_TAG] == digest(place.files / "evidence" / "lineage.json")
    logged = client.download_artifacts(place.made.recorded.mlflow_run_id, "lineage.json", str(tmp_path))
    assert digest(Path(logged)) == tags[LINEAGE_TAG]
    found = client.search_model_versions("tags.`tunegate.seed` = '17' and tags.`tunegate.data_licence` = 'CC-BY-4.0'")
    assert [version.version for version in found] == [1]


def test_its_scores_name_the_split_they_were_measured_on(place):
    client = connect(place.spec.store)
    model = client.get_logged_model(client.get_model_version(NAME, "1").source.removeprefix("models:/"))
    found = {(item.dataset_name, item.dataset_digest) for item in model.metrics if item.key == "nll_nats"}
    assert found == {("test", place.data.test.sha256[:32])}


def test_the_lineage_says_what_it_was_made_from(place):
    found = place.lineage
    assert (found.base.name, found.base_licence, found.data.licence) == ("tiny", "MIT", "CC-BY-4.0")
    assert found.data.sources == {"rows.jsonl": digest(place.rows)} and found.data.source_rows == {"rows.jsonl": 80}
    assert found.data.train_sha256 == digest(place.store.path(place.data.train))
    assert found.training.adapter.sha256 == digest(place.files / "adapter" / "adapter_model.safetensors")
    assert found.training.settings["rank"] == 4 and found.training.seed == 17
    assert (found.machine.threads, found.machine.precision, found.machine.device) == (1, "fp32", "cpu")
    assert found.machine.packages["torch"] and found.code.digest == "c" * 64
    assert (found.judgement.verdict, found.judgement.nll_nats, found.judgement.champion) == ("pass", 2.0, None)


def test_no_file_of_it_names_a_folder_of_this_machine(place):
    texts = [
        path for path in place.files.parent.rglob("*") if path.suffix not in (".safetensors", ".png") and path.is_file()
    ]
    assert {"MLmodel", "lineage.json", "spec.yaml", "adapter_config.json"} <= {path.name for path in texts}
    places = [str(place.root), str(Path.home()), "/home/somebody", str(Path(__file__).parents[2]), "/tmp"]
    assert [(path.name, where) for path in texts for where in places if where in path.read_text(errors="replace")] == []


def test_the_bill_of_materials_is_valid_and_names_base_data_and_packages(place):
    text = (place.files / "evidence" / "sbom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bill = json.loads(text)
    kinds = {item["name"]: item["type"] for item in bill["components"]}
    assert (kinds["tiny"], kinds["rows.jsonl"], kinds["torch"]) == ("machine-learning-model", "data", "library")
    assert bill["metadata"]["component"]["name"] == NAME
    assert [item["licenses"] for item in bill["components"] if item["name"] == "tiny"] == [[{"license": {"id": "MIT"}}]]


def test_the_card_is_one_that_hubs_read_and_escapes_what_others_wrote(place):
    card = ModelCard.load(place.files / "evidence" / "README.md")
    assert card.data.license == "mit" and card.data.base_model is None
    assert {result.metric_type: result.metric_value for result in card.data.eval_results}["nll_nats"] == 2.0
    assert "| held-out loss, nats/token | 4.000 | 2.000 |" in card.text
    assert "| retention | at least 0.8 | 0.900 | 0.850 to 0.950 | pass | kept |" in card.text
    assert "served on the full&#45;precision base" in card.text or "served on the full-precision base" in card.text
    pictures = [line.partition("](")[2][:-1] for line in card.text.splitlines() if line.startswith("![")]
    assert len(pictures) >= 4 and all((place.files / "evidence" / picture).exists() for picture in pictures)


def test_the_environment_is_a_lock_that_pip_reads(place):
    from packaging.requirements import Requirement

    lines = (place.files / "evidence" / "environment.txt").read_text().splitlines()
    pins = {Requirement(line).name for line in lines if not line.startswith("#")}
    assert {"torch", "transformers", "peft"} <= pins and "tunegate" not in pins


def test_the_same_key_makes_no_second_version_and_a_crash_leaves_none(place, monkeypatch):
    assert register_version(place.made).version == "1"
    made = replace(place.made, key="register-2")
    with monkeypatch.context() as patch:
        patch.setattr("mlflow.MlflowClient.create_model_version", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            register_version(made)
    client = connect(place.spec.store)
    assert len(client.search_model_versions(f"name = '{NAME}'")) == 1
    second = register_version(made)
    assert second == ModelVersion(name=NAME, version="2", aliases=["challenger"], run_id=second.run_id)
    client.delete_model_version(NAME, "2")


def test_a_lineage_that_is_not_the_registered_one_is_refused(place, tmp_path):
    tags = {LINEAGE_TAG: digest(place.files / "evidence" / "lineage.json")}
    assert lineages.read_lineage(place.files, tags, "m version 1") == place.lineage
    copy = shutil.copytree(place.files, tmp_path / "copy")
    (copy / "evidence" / "lineage.json").write_text((copy / "evidence" / "lineage.json").read_text() + " ")
    with pytest.raises(StoreError, match=r"lineage\.json of m version 1 is not the file that was registered"):
        lineages.read_lineage(copy, tags, "m version 1")
    with pytest.raises(ConfigError, match="m version 1 has no lineage: it was registered before"):
        lineages.read_lineage(copy, {}, "m version 1")


@pytest.mark.parametrize(
    ("data", "licence"),
    [
        ({"licence": "CC0-1.0"}, "CC0-1.0"),
        ({}, "PSF-2.0"),
        ({"packages": ["json", "os.path"]}, "PSF-2.0"),
        ({"packages": ["json", "cyclonedx"]}, "Apache-2.0 AND PSF-2.0"),
        ({"packages": ["no_such_package"]}, "unknown"),
        ({"source": ["rows.jsonl"]}, "unknown"),
    ],
)
def test_the_licence_of_data_is_what_somebody_said_or_known_of_built_in_data(data, licence):
    assert data_licence(RunSpec.model_validate({"data": data}).data) == licence


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\n---\n# A model", "mit"),
        ("---\nlicense: [\n---\n", "unknown"),
        ("---\n- a list\n---\n", "unknown"),
        ("# A model", "unknown"),
        (None, "unknown"),
    ],
)
def test_the_licence_of_a_base_is_what_its_card_says(tmp_path, card, licence):
    from tasks.models.workers.prepare_base import _licence

    if card:
        (tmp_path / "README.md").write_text(card)
    assert _licence(tmp_path, str(tmp_path), None) == licence
    assert _licence(tmp_path, "org/name", "abc" if card is None else None) == licence  # the hub is out of reach here


def test_of_a_path_the_last_part_stays_and_a_hub_id_as_it_is():
    names = [
        "/data/rows.jsonl",
        "~/rows.jsonl",
        "file:///data/rows.jsonl",
        "org/name",
        "s3://b/rows.jsonl",
        "builtin:x",
        "a/b",
    ]
    assert [without_place(name) for name in names] == ["rows.jsonl"] * 3 + names[3:]


# --- made again ---------------------------------------------------------------------------------------------


def named(found: Reproduction) -> dict[str, bool]:
    return {item.what: item.same for item in found.compared}


def test_it_is_made_again_to_the_byte_from_the_stores_snapshot(place, monkeypatch):
    monkeypatch.chdir(place.root)
    found = place.again(root=place.store.root.name)  # as a preset names it
    assert found.result == "identical" and found.adapter_now == place.arm.adapter.sha256
    assert found.data == "the store's snapshot, split again with the ledger as of that run"
    assert {what for what, same in named(found).items() if not same} <= {"code of the training"}  # planted as c...
    assert {"snapshot", "train split", "test split", "step-0 adapter", "threads", "torch", "processor"} <= named(
        found
    ).keys()
    assert found.kept is None and not (place.store.files / "reproductions" / f"{NAME}-1").exists()


def test_the_ledger_of_then_knows_nothing_that_came_later(tmp_path):
    store = Store(tmp_path / "now")

    def known() -> tuple:
        return ledger.known_splits(store, "model"), ledger.held_out(store, "model"), ledger.releases(store, "model")

    first = split_rows(store, facts(40), test_fraction=0.2).snapshot_id
    ledger.release_rows(store, "model", ["a"], "refusal", "early")
    then, at = known(), time.time()
    second = split_rows(store, facts(80), test_fraction=0.2).snapshot_id
    ledger.release_rows(store, "model", ["b"], "refusal", "late")
    now = known()
    for batch, expected in ((second, then), (first, ({}, [], then[2])), ("never recorded", (now[0], now[1], then[2]))):
        store = Store(tmp_path / batch[:8])
        ledger.copy_before(Store(tmp_path / "now"), store, "model", batch, at)
        assert known() == expected
        assert ledger.new_rows(store, "model", second) == (None if batch != "never recorded" else 40)


@pytest.fixture
def whole(place) -> Iterator[Place]:
    """Whatever a test takes away or changes in the store and at the source is put back."""
    kept = {path: shutil.copytree(path, place.root / f"kept-{path.name}") for path in store_folders(place)}
    rows = place.rows.read_text()
    yield place
    for path, copy in kept.items():
        shutil.rmtree(path, ignore_errors=True)
        copy.rename(path)
    place.rows.write_text(rows)


def store_folders(place: Place) -> list[Path]:
    return [place.store.files / name for name in ("snapshots", "datasets")]


@pytest.mark.slow
def test_a_ledger_that_has_moved_on_changes_nothing(place):
    more = place.root / "more.jsonl"
    more.write_text("".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in facts(160)))
    data = place.spec.data.model_copy(update={"source": [str(more)]})
    snapshot = ingest_sources(place.store, data)
    validated = validate(place.store, snapshot, Checks(place.spec.rules, place.spec.contract))
    curate_rows(place.store, validated, Curation(place.spec.curate, NAME))
    found = place.again()
    assert found.result == "identical" and named(found)["test split"] and named(found)["fate of every row"]


def test_without_snapshot_and_sources_it_says_what_to_restore(whole):
    shutil.rmtree(whole.store.files / "snapshots")
    with pytest.raises(DataError) as error:
        whole.again()
    assert "the rows of the version are gone: the store's snapshot is not there" in str(error.value)
    assert "--set data.source=PATH" in str(error.value) and "rows.jsonl: no such file or folder" in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.slow
def test_a_snapshot_that_is_gone_is_made_from_its_sources(whole):
    shutil.rmtree(whole.store.files / "snapshots")
    found = whole.again(f"data.source={whole.rows}")
    assert found.result == "identical"
    assert found.data.startswith("the sources read again (the store's snapshot is not there)")


@pytest.mark.slow
def test_a_changed_source_is_named_and_is_not_trained_on(whole):
    whole.rows.write_text(whole.rows.read_text().replace("What is item 0-3?", "What was item 0-3?"))
    found = whole.again(f"data.source={whole.rows}")
    assert found.result == "identical" and not named(found)["source rows.jsonl"]
    shutil.rmtree(whole.store.files / "snapshots")
    with pytest.raises(DataError, match=rf"rows\.jsonl: sha256 \w{{12}} then, {digest(whole.rows)[:12]} now") as error:
        whole.again(f"data.source={whole.rows}")
    assert error.value.exit_code == 2


@pytest.mark.slow
@pytest.mark.parametrize(("change", "why"), [("rows", "changed"), ("bytes", "damaged")])
def test_a_snapshot_that_was_tampered_with_is_not_used(whole, change, why):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (part,) = (whole.store.files / "snapshots" / whole.data.snapshot_id / "parts").iterdir()
    if change == "rows":
        rows = pq.read_table(part).to_pylist()
        pq.write_table(pa.Table.from_pylist([*rows[1:], rows[0] | {"raw": "{}"}]), part)
    else:
        part.write_bytes(b"no parquet")
    found = whole.again(f"data.source={whole.rows}")
    assert found.data.startswith(f"the sources read again (the store's snapshot is {why})")


@pytest.mark.slow
def test_where_splits_cannot_be_made_again_the_recorded_ones_serve_if_they_are_whole(whole):
    found = whole.again("contract.suite=gone.json")
    assert found.result == "identical" and "train split" not in named(found)
    assert "they could not be split again" in found.data and found.data.endswith("come from the store's own data set")
    train = whole.store.path(whole.data.train)
    train.write_text(train.read_text().replace("item 0-", "item 1-"))
    with pytest.raises(DataError, match=r"train\.jsonl is not the split that was recorded"):
        whole.again("contract.suite=gone.json")


@pytest.mark.slow
def test_a_base_that_has_changed_is_refused(place, tmp_path, tiny_base):
    link = place.store.files / "bases" / "tiny"
    other = shutil.copytree(tiny_base, tmp_path / "other")
    (other / "note.txt").write_text("changed")
    link.unlink()
    link.symlink_to(other)
    try:
        with pytest.raises(ConfigError, match=r"--set model\.base=PATH"):
            place.again(f"model.base={other}")
    finally:
        link.unlink()
        link.symlink_to(tiny_base)


def test_only_places_and_threads_may_be_changed(place):
    with pytest.raises(ConfigError, match=r"train\.rank is what it was then"):
        place.again("train.rank=8")


@pytest.mark.slow
def test_an_adapter_that_differs_is_measured_and_the_likely_reasons_are_named(place, monkeypatch):
    """The version says that it was trained with another seed than it was."""
    arm = place.arm.model_copy(update={"seed": 18})
    spec = place.spec.model_copy(update={"train": place.spec.train.model_copy(update={"seeds": [18]})})
    version = register_version(place.made._replace(key="register-3", arm=arm, spec=spec)).version
    packages = lineages.packages()
    monkeypatch.setattr(lineages, "packages", lambda: packages | {"torch": "0.0.1"})
    spec, _ = reproduction_spec(place.spec.store, f"models:/{NAME}/{version}", [])
    found = reproduce_flow.fn(spec, f"models:/{NAME}/{version}")
    assert found.result == "different" and found.distance > 0.1
    assert found.loss_then_nats != found.loss_now_nats
    assert any(reason.startswith("step-0 adapter: ") for reason in found.reasons)
    assert f"torch: {packages['torch']} then, 0.0.1 now" in found.reasons
    assert (place.store.files / found.kept / "adapter_model.safetensors").exists()
    connect(place.spec.store).delete_model_version(NAME, version)


def test_equal_takes_both_tensors_and_losses():
    assert result_of(None, None, None) == "identical"
    assert result_of(0.01, 2.0, 2.001) == "equal within tolerance"
    assert {result_of(0.2, 2.0, 2.0), result_of(0.01, 2.0, 2.1), result_of(0.01, None, None)} == {"different"}


def test_the_distance_of_adapters_is_that_of_their_worst_tensor():
    import math

    import torch

    from tasks.reproduction.workers.compare_adapters import distance

    then = {"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(2)}
    assert distance(then, {**then}) == 0.0
    assert distance(then, then | {"a": torch.tensor([3.0, 4.5])}) == pytest.approx(0.1)
    for now in ({"a": then["a"]}, then | {"b": torch.ones(2)}, then | {"a": torch.tensor([math.nan, 4.0])}):
        assert distance(then, now) == math.inf


def test_what_was_kept_before_0_2_is_read_with_its_champion(tmp_path):
    judgement = {"verdict": "pass", "items_sha256": "i", "nll_nats": 2.0, "candidate": "lora", "rival": "m version 1"}
    assert Judgement.model_validate(judgement).champion == "m version 1"
    found = planted(tmp_path)
    decision = {"model": "models:/m/2", "name": "m", "version": "2", "rival": "m version 1"}
    decision |= {"gate": found.gate.model_dump(), "comparison": found.comparison.model_dump()}
    kept = {"adapter_sha256": "b", "rival_adapter_sha256": "a", "answers": [], "precision": None, "unix_seconds": 1.0}
    assert KeptDecision.model_validate(kept | {"decision": decision}).champion_adapter_sha256 == "a"
