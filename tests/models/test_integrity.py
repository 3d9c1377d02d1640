"""A registered version that is not the one that was registered is never loaded: not by us, not through plain MLflow.

The versions are real: a tiny base, trained arms, MLflow's registry in a database. Workers run in this process.

    TUNEGATE_FUZZ_CASES=20000 pytest tests/models/test_integrity.py      a long run
"""

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import mlflow
import pytest

from data_contracts.errors import ConfigError, StoreError
from data_contracts.jobs.models import PrepareBaseJob
from data_contracts.lineage import EVIDENCE, LINEAGE_FILE, LINEAGE_TAG
from data_contracts.reports import EvalTarget
from tasks.evaluation import evaluate
from tasks.models.core.adapter_files import WEIGHTS
from tasks.models.integrity import checked_adapter, checked_base, digest_of, verify_version
from tasks.release import registry
from tasks.runtime.mlflow_client import connect
from tasks.runtime.store import digest
from tasks.training.workers import checkpoints
from tests.support.generations import (
    NAME,
    Generation,
    Place,
    workers_here,  # noqa: F401 a fixture of this module too
)
from tests.support.mutations import mutate_bytes, mutate_json

CASES = int(os.environ.get("TUNEGATE_FUZZ_CASES", "150"))
SEED = int(os.environ.get("TUNEGATE_FUZZ_SEED", "11"))
pytestmark = pytest.mark.filterwarnings("ignore")


class Version(NamedTuple):
    """A copy of a registered version's folder, with its tags."""

    folder: Path
    tags: dict[str, str]

    @property
    def artifacts(self) -> Path:
        return self.folder / "artifacts"

    def verify(self) -> None:
        verify_version(self.folder, self.tags, "grows version 1")


@pytest.fixture(scope="module")
def place(tiny_base, tmp_path_factory) -> Place:
    place = Place(tmp_path_factory.mktemp("integrity"), tiny_base)
    place.base = place.base.model_copy(update={"stops": ["<|end|>"]})
    return place


@pytest.fixture(scope="module")
def generation(place) -> Generation:
    return place.generation(60)


@pytest.fixture(scope="module")
def registered(place, generation) -> registry.Registered:
    return registry.resolve(place.model, f"models:/{NAME}/1")


@pytest.fixture(scope="module")
def whole(place, registered, tmp_path_factory) -> Version:
    """With a lineage, if the version has none of its own yet."""
    tags = dict(connect(place.model).get_model_version(NAME, "1").tags)
    folder = tmp_path_factory.mktemp("version") / "model"
    shutil.copytree(registered.folder, folder)
    if LINEAGE_TAG not in tags:
        files = [path for path in sorted((folder / "artifacts").rglob("*")) if path.is_file()]
        named = {path.relative_to(folder / "artifacts").as_posix(): digest(path) for path in files}
        (folder / "artifacts" / EVIDENCE).mkdir()
        (folder / "artifacts" / EVIDENCE / LINEAGE_FILE).write_text(json.dumps({"name": NAME, "files": named}))
        tags[LINEAGE_TAG] = digest(folder / "artifacts" / EVIDENCE / LINEAGE_FILE)
    return Version(folder, tags)


@pytest.fixture
def version(whole, tmp_path) -> Version:
    shutil.copytree(whole.folder, tmp_path / "model")
    return Version(tmp_path / "model", dict(whole.tags))


def test_a_whole_version_passes_in_whatever_folder(version, registered):
    version.verify()
    assert registered.adapter.sha256 == digest(version.artifacts / "adapter" / WEIGHTS)


def append(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with (folder / name).open("ab") as file:
            file.write(b" ")

    return change


def flip(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        raw = bytearray((folder / name).read_bytes())
        raw[-5] ^= 1
        (folder / name).write_bytes(raw)

    return change


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-9])


def link(name: str) -> Callable[[Path], None]:
    """The same content, but the owner of the other file can change it."""

    def change(folder: Path) -> None:
        (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")

    return change


def add(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(b"import os\n")


def in_model(old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / "MLmodel").read_text()
        assert old in text
        (folder / "MLmodel").write_text(text.replace(old, new))

    return change


ADAPTER = f"artifacts/adapter/{WEIGHTS}"
LINEAGE = f"artifacts/{EVIDENCE}/{LINEAGE_FILE}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip(ADAPTER), f"adapter/{WEIGHTS} of grows version 1 is not the file that was registered"),
        (cut(ADAPTER), f"adapter/{WEIGHTS} of grows version 1 is not the file"),
        (lambda folder: (folder / ADAPTER).unlink(), r"\(no file instead of"),
        (append("artifacts/adapter/adapter_config.json"), "adapter/adapter_config.json of grows version 1 is not the file"),
        (append("artifacts/meta.json"), "meta.json of grows version 1 is not the file"),
        (append("artifacts/trained_rows.txt"), "trained_rows.txt of grows version 1 is not the file"),
        (append(LINEAGE), f"{EVIDENCE}/{LINEAGE_FILE} of grows version 1 is not the file"),
        (lambda folder: (folder / LINEAGE).unlink(), f"{LINEAGE_FILE} of grows version 1 is not the file"),
        (append("served_model.py"), "served_model.py of grows version 1 is not the file that was registered"),
        (link(ADAPTER), "is a link, or no plain file"),
        (link("served_model.py"), "served_model.py of grows version 1 is a link"),
        (add("artifacts/adapter/adapter_model.bin"), "adapter_model.bin of grows version 1 does not belong to it"),
        (add("artifacts/adapter/notes.txt"), "adapter/notes.txt of grows version 1 is not listed in its lineage"),
        (add("artifacts/evidence/more.json"), "evidence/more.json of grows version 1 is not listed in its lineage"),
        (add("python_model.pkl"), "python_model.pkl of grows version 1 does not belong to it"),
        (add("torch.py"), "torch.py of grows version 1 does not belong to it"),
        (in_model("mlflow.pyfunc.loaders.code_model", "antigravity"), "MLmodel of grows version 1 would run something else"),
        (in_model("code: null", "code: artifacts"), "would run something else"),
        (in_model("    loader_module:", "    data: artifacts\n    loader_module:"), "would run something else"),
        (in_model("path: artifacts/adapter", "path: artifacts/../../adapter"), "names other files than its own"),
        (in_model("path: artifacts/trained_rows.txt", "path: artifacts/../../x"), "names other files than its own"),
        (in_model("flavors:", "flavors:\n  keras: {}"), "MLmodel or meta.json of grows version 1 cannot be read"),
        (cut("MLmodel"), "MLmodel"),
        (lambda folder: (folder / "MLmodel").write_text("[" * 2000), "MLmodel or meta.json of grows version 1 cannot be read"),
        (lambda folder: (folder / "MLmodel").write_text("[" * 10**6), "ValueError: more than 16,384 bytes"),
    ],
)  # fmt: skip
def test_whatever_is_changed_in_a_version_it_is_refused_with_the_file_and_the_next_act(version, change, message):
    change(version.folder)
    with pytest.raises(StoreError, match=message) as refused:
        version.verify()
    assert refused.value.exit_code == 4
    assert all("roll back to a whole version" in problem.act for problem in refused.value.problems)


def test_everything_that_was_changed_is_told_at_once(version):
    for name in ("artifacts/meta.json", "artifacts/trained_rows.txt", ADAPTER):
        append(name)(version.folder)
    with pytest.raises(StoreError) as refused:
        version.verify()
    assert {problem.what.partition(" ")[0] for problem in refused.value.problems} == {
        "meta.json", "trained_rows.txt", f"adapter/{WEIGHTS}",
    }  # fmt: skip


def test_a_lineage_that_fits_other_files_does_not_fit_its_tag(version):
    """Anyone who can write the artifacts but not the registry cannot change what the registry expects."""
    flip(ADAPTER)(version.folder)
    lineage = json.loads((version.folder / LINEAGE).read_bytes())
    lineage["files"][f"adapter/{WEIGHTS}"] = digest(version.folder / ADAPTER)
    (version.folder / LINEAGE).write_text(json.dumps(lineage))
    with pytest.raises(StoreError, match=f"{LINEAGE_FILE} of grows version 1 is not the file"):
        version.verify()


@pytest.mark.parametrize("files", [None, [], "x", {"../../../etc/passwd": "0"}, {"/etc/passwd": "0"}, {"a\0b": "0"}])
def test_a_lineage_cannot_lead_out_of_its_version(version, files):
    (version.folder / LINEAGE).write_text(json.dumps({"files": files}))
    version.tags[LINEAGE_TAG] = digest(version.folder / LINEAGE)
    with pytest.raises(StoreError, match=r"names no files|no file instead of"):
        version.verify()


def test_another_base_in_its_tags_than_in_its_files_is_refused(version):
    version.tags["tunegate.base_digest"] = "0" * 64
    with pytest.raises(StoreError, match=r"meta\.json of grows version 1 names another base than its tags"):
        version.verify()


def test_a_version_from_before_lineage_is_known_by_its_adapter_which_is_logged_once(version, capsys):
    version.tags.pop(LINEAGE_TAG)
    label = "old version 7"
    for _ in range(2):
        verify_version(version.folder, version.tags, label)
    assert capsys.readouterr().err.count(f"{label} was registered without a lineage: only its adapter is checked") == 1
    flip(ADAPTER)(version.folder)
    with pytest.raises(StoreError, match=f"{WEIGHTS} of grows version 1 is not the file"):
        version.verify()


# --- every door ---------------------------------------------------------------------------------------------


@pytest.fixture
def tampered(registered):
    """The version in the registry itself, with another bit in its adapter; put back afterwards."""
    file = Path(registered.adapter.folder) / WEIGHTS
    before = file.read_bytes()
    flip(WEIGHTS)(file.parent)
    yield file
    file.write_bytes(before)


def test_every_way_to_a_version_passes_the_check(place, generation, registered, tampered):
    uri, refused = f"models:/{NAME}/1", f"{WEIGHTS} of {NAME} version 1 is not the file that was registered"
    for way in (
        lambda: registry.resolve(place.model, uri),
        lambda: registry.champion(place.model, NAME),
        lambda: registry.ask_version(place.model, uri, ["?"], 4),
        lambda: place.origin(generation.data),
    ):
        with pytest.raises(StoreError, match=refused):
            way()


def test_an_adapter_that_changed_after_it_was_found_is_not_scored(place, registered, tampered):
    adapter = registered.adapter
    target = EvalTarget(name="x", method="lora", adapter=adapter, quantisation=None)
    with pytest.raises(StoreError, match="has changed"):
        evaluate._scored_model(place.store, target)


def test_a_base_that_changed_after_it_was_prepared_is_not_used(place, generation, tiny_base):
    assert checked_base(place.store, place.base) == place.store.path(place.base.path)
    file = tiny_base / "generation_config.json"
    before = file.read_bytes()
    file.write_bytes(before + b" ")
    try:
        with pytest.raises(StoreError, match="the base tiny has changed"):
            checked_base(place.store, place.base)
    finally:
        file.write_bytes(before)
    assert checked_base(place.store, place.base)


def test_an_adapter_of_the_store_is_known_by_its_digest(place, generation):
    adapter = generation.arm.adapter
    assert checked_adapter(place.store, adapter) == place.store.path(adapter.folder)
    with pytest.raises(StoreError, match="has changed"):
        checked_adapter(place.store, adapter.model_copy(update={"sha256": "0" * 64}))


def test_a_digest_is_taken_anew_for_every_state_of_a_file(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"one")
    seen, times = digest_of(file), file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as if nothing had happened
    assert seen == hashlib.sha256(b"one").hexdigest() != digest_of(file) == hashlib.sha256(b"two").hexdigest()


# --- through plain MLflow -----------------------------------------------------------------------------------


@pytest.fixture
def served(version, place, monkeypatch) -> Version:
    monkeypatch.setenv("TUNEGATE_STORE_DIR", str(place.store.root))
    return version


def test_plain_mlflow_loads_a_whole_version_which_answers_and_stays_whole(served):
    model = mlflow.pyfunc.load_model(str(served.folder))
    (answer,) = model.predict(["What comes after 3?"], params={"max_new_tokens": 4})
    assert isinstance(answer, str)
    assert (served.folder / "__pycache__").exists()  # Python has kept a compiled copy of its code
    served.verify()


@pytest.mark.parametrize(
    "change",
    [flip(ADAPTER), cut(ADAPTER), append("artifacts/adapter/adapter_config.json"), link(ADAPTER),
     add("artifacts/adapter/adapter_model.bin"), add("artifacts/adapter/x.py"), lambda f: (f / ADAPTER).unlink()],
)  # fmt: skip
def test_plain_mlflow_refuses_another_adapter(served, change):
    change(served.folder)
    with pytest.raises(ValueError, match="is not the adapter that was registered: "):
        mlflow.pyfunc.load_model(str(served.folder))


def test_plain_mlflow_refuses_another_base(served, place, tiny_base, tmp_path, monkeypatch):
    shutil.copytree(tiny_base, tmp_path / "base")
    monkeypatch.setenv("TUNEGATE_BASE_DIR", str(tmp_path / "base"))
    mlflow.pyfunc.load_model(str(served.folder))
    (tmp_path / "base" / "more.json").write_text("{}")
    with pytest.raises(ValueError, match="is not the base this adapter was trained on"):
        mlflow.pyfunc.load_model(str(served.folder))


def test_a_base_of_the_hub_is_held_against_its_digest_too(tiny_base, tmp_path, monkeypatch):
    """A hub cache on this machine stands in for the hub: it is what a download ends in."""
    from huggingface_hub import constants

    from tasks.release.workers.served_model import find_base

    revision = "a" * 40
    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / revision
    shutil.copytree(tiny_base, snapshot)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("TUNEGATE_STORE_DIR", raising=False)
    meta = {"base": "org/tiny", "base_path": "nowhere", "base_revision": revision, "base_digest": digest(tiny_base)}
    assert find_base(meta, []) == str(snapshot)
    flip("model.safetensors")(snapshot)
    with pytest.raises(ValueError, match="is not the base this adapter was trained on"):
        find_base(meta, [])


# --- bases --------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tiny_base, tmp_path) -> Path:
    shutil.copytree(tiny_base, tmp_path / "base")
    return tmp_path / "base"


def in_config(**changes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return change


INDEX = {"weight_map": {"lm_head.weight": "../../outside.safetensors"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "it holds no .safetensors weights"),
        (cut("model.safetensors"), "model.safetensors: is not a complete safetensors file"),
        (lambda f: (f / "model.safetensors.index.json").write_text(json.dumps(INDEX)), "names ../../outside.safetensors"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter_config.json would put an adapter on it"),
        (lambda f: (f / "config.json").write_text("[" * 5000), "config.json is no configuration"),
        (in_config(model_type="mine", auto_map={"AutoConfig": "mine.Config"}), "needs code of its own"),
    ],
)  # fmt: skip
def test_a_base_that_would_not_load_as_it_is_meant_is_refused_before_it_is_loaded(base, tmp_path, change, message):
    from tasks.models.workers.prepare_base import prepare

    change(base)
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        prepare(PrepareBaseJob(base=str(base), revision=None), tmp_path / "out")
    assert refused.value.exit_code == 2


def test_code_that_comes_with_a_base_is_not_run(base, tmp_path):
    from tasks.models.workers.loading import load_base
    from tasks.models.workers.prepare_base import prepare
    from tests.support.devices import CPU

    (base / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": ["own.Tokenizer", None]}
    in_config(auto_map=own)(base)
    found = prepare(PrepareBaseJob(base=str(base), revision=None), tmp_path / "out")
    load_base(Path(found["path"]), "lora", CPU)
    load_base(Path(found["path"]), "qlora", CPU)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["org/na..me", "a/..", "..", "org/name/../../x", "org/na\0me", "/nowhere", "~/nowhere"]
)
def test_a_base_whose_name_is_no_hub_id_is_no_path_either(tmp_path, name):
    from tasks.models.workers.prepare_base import prepare

    with pytest.raises(ConfigError):
        prepare(PrepareBaseJob(base=name, revision=None), tmp_path)


# --- checkpoints --------------------------------------------------------------------------------------------


def checkpoint(out: Path, step: int = 3, best: object = None) -> Path:
    folder = out / f"checkpoint-{step}"
    with checkpoints.published(folder, 1):
        folder.mkdir(parents=True)
        (folder / "rng_state.pth").write_bytes(b"random")
        (folder / "trainer_state.json").write_text(json.dumps({"best_global_step": best, "log_history": []}))
    return folder


@pytest.mark.parametrize("best", ["../../elsewhere", "3/../..", [1], {"a": 1}, -1, 1e300, True])
def test_the_best_checkpoint_is_a_number_beside_it(tmp_path, best):
    checkpoint(tmp_path, best=best)
    found = checkpoints.last_checkpoint(tmp_path)
    assert found is None or [path.parent for path in checkpoints._best(found)] in ([], [tmp_path])


def test_folders_that_are_no_checkpoints_are_left_alone(tmp_path):
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-").mkdir()
    assert checkpoints.last_checkpoint(tmp_path) is None
    assert checkpoints.last_checkpoint(checkpoint(tmp_path).parent) == tmp_path / "checkpoint-3"
    assert (tmp_path / "checkpoint-x").exists()


@pytest.mark.timeout(280 + CASES)
def test_whatever_is_in_a_checkpoint_it_is_the_one_that_was_written_or_none(tmp_path):
    draw = random.Random(SEED)
    whole, found = checkpoint(tmp_path / "whole"), 0
    for case in range(CASES):
        folder = Path(shutil.copytree(whole, tmp_path / str(case) / whole.name))
        before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
        file = draw.choice(sorted(folder.iterdir()))
        if file.suffix == ".json" and draw.random() < 0.5:
            file.write_text(json.dumps(mutate_json(json.loads(file.read_bytes()), draw)))
        else:
            file.write_bytes(mutate_bytes(file.read_bytes(), draw))
        if last := checkpoints.last_checkpoint(folder.parent):
            found += 1
            assert {path.name: path.read_bytes() for path in last.iterdir() if path.name != "manifest.json"} == before
    assert found < CASES / 2


# --- names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x' OR name != '", "../x", "", "a/b", "x\n", "x\0", "-x"])
def test_a_name_that_is_none_is_refused_before_the_registry_is_asked(place, name):
    with pytest.raises(ConfigError):
        registry.alias_version(connect(place.model), name, "champion")
    with pytest.raises(ConfigError):
        registry.resolve(place.model, f"models:/{name}/1")


# --- fuzz ---------------------------------------------------------------------------------------------------


def damage(version: Version, draw: random.Random) -> None:
    """Something happens to one of the files that are acted on."""
    files = [path for path in sorted(version.artifacts.rglob("*")) if path.is_file()]
    files += [version.folder / "MLmodel", version.folder / "served_model.py"]
    file = draw.choice(files)
    if file.suffix == ".json" and file.stat().st_size and draw.random() < 0.5:
        file.write_text(json.dumps(mutate_json(json.loads(file.read_bytes()), draw)))
    elif (kind := draw.randrange(10)) == 0:
        file.unlink()
    elif kind == 1:
        file.replace(file.with_name(draw.choice(["x.json", "x.py", "adapter_model.bin", "meta.json", "a b"])))
    else:
        file.write_bytes(mutate_bytes(file.read_bytes(), draw))


def content(version: Version) -> dict[str, bytes]:
    acted_on = [*version.artifacts.rglob("*"), version.folder / "MLmodel", version.folder / "served_model.py"]
    return {str(path.relative_to(version.folder)): path.read_bytes() for path in acted_on if path.is_file()}


def restore(version: Version, files: dict[str, bytes]) -> None:
    for name, found in content(version).items():
        if name not in files:
            (version.folder / name).unlink()
        elif found != files[name]:
            (version.folder / name).write_bytes(files[name])
    for name in files.keys() - content(version).keys():
        (version.folder / name).write_bytes(files[name])


@pytest.mark.timeout(280 + CASES)
def test_whatever_happens_to_a_version_it_is_byte_for_byte_the_registered_one_or_refused(version):
    draw = random.Random(SEED)
    expected, refused = content(version), 0
    for case in range(CASES):
        damage(version, draw)
        try:
            version.verify()
        except StoreError as error:
            refused += 1
            assert len(error.problems) <= 13, case
        else:
            same = content(version).items() ^ expected.items()
            assert {name for name, _ in same} <= {"MLmodel"}, case  # it may be written otherwise, and say the same
        restore(version, expected)
    assert CASES * 0.8 < refused < CASES
