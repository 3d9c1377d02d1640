"""Passwords, keys and tokens come from the environment and end there: no address holds one, no name leads elsewhere.

That a whole run leaves none of its environment's secrets in its store is in tests/flows/test_chain.py.
"""

from pathlib import Path

import fsspec
import pytest

from data_contracts.data_spec import DataSpec
from data_contracts.errors import ConfigError, StoreError
from data_contracts.run_spec import ModelSpec, StoreSpec
from data_contracts.train_spec import VariantSpec
from flows.cli.app import main
from flows.config.load import load_spec
from tasks.data.ingestion.sources import find_sources, local_copies
from tasks.runtime.store import Store

SECRET = "hunter2zzz"


@pytest.mark.parametrize(
    "uri",
    [
        f"postgresql://u:{SECRET}@h/db", f"postgresql+psycopg2://u:{SECRET}@h:5432/db", f"mysql://u:a/{SECRET}@h/db",
        f"https://u:{SECRET}@mlflow.example.org", f"http://{SECRET}@mlflow.example.org:5000/x",
        f"postgresql://h/db?user=u&password={SECRET}", f"http://h:5000/?token={SECRET}",
    ],
)  # fmt: skip
def test_a_password_in_the_address_of_the_registry_is_refused_and_never_repeated(uri, tmp_path, capsys):
    with pytest.raises(ConfigError) as refused:
        load_spec("smoke", [f"store.mlflow_uri={uri}"])
    assert "put it in the environment: MLFLOW_TRACKING_USERNAME" in str(refused.value)
    with pytest.raises(ValueError) as by_form:
        StoreSpec(mlflow_uri=uri)
    code = main(["run", "smoke", "--dry-run", "--json", "--set", f"store.mlflow_uri={uri}"])
    file = tmp_path / "spec.yaml"
    file.write_text(f'store:\n  mlflow_uri: "{uri}"\n')
    assert code == main(["run", str(file), "--dry-run"]) == 2
    said = capsys.readouterr()
    assert SECRET not in f"{refused.value}{by_form.value}{said.out}{said.err}"


@pytest.mark.parametrize(
    "entry", [f"https://{SECRET}@example.org/x.csv", f"s3://key:{SECRET}@bucket/x.csv", f"https://h/x.csv?pwd={SECRET}"]
)
def test_so_is_one_in_the_address_of_a_source(entry):
    with pytest.raises(ConfigError) as refused:
        load_spec("smoke", [f"data.source={entry}"])
    with pytest.raises(ValueError) as by_form:
        DataSpec(source=[entry])
    assert SECRET not in f"{refused.value}{by_form.value}"


@pytest.mark.parametrize(
    "uri", ["http://mlflow:5000", "https://mlflow.example.org/a@b", "postgresql://u@h:5432/db", "sqlite:///a/x@y.db"]
)
def test_addresses_without_one_are_taken(uri):
    assert StoreSpec(mlflow_uri=uri).mlflow_uri == uri
    assert DataSpec(source=["sftp://me@host/x.csv", "webhdfs://h:9870/a@b.csv", "s3://bucket/a:b@c.csv"])


# --- names that become paths --------------------------------------------------------------------------------

ESCAPES = ["../x", "a/../../x", "/etc/passwd", "..", "a/..", "a\0b"]


@pytest.mark.parametrize("name", [name for name in ESCAPES if name != "/etc/passwd"])
def test_no_manifest_climbs_out_of_the_store(tmp_path, name):
    (tmp_path / "x").write_text("outside")
    (tmp_path / "store").mkdir()
    with pytest.raises(StoreError, match="leads out of the store"):
        Store(tmp_path).path(name)


@pytest.mark.parametrize("name", [*ESCAPES, ".hidden", "~", "a b", "a\n"])
def test_names_in_a_spec_are_names(name):
    for make in (
        lambda: ModelSpec(name=name),
        lambda: ModelSpec(revision=name),
        lambda: VariantSpec(name=name, method="lora", settings={}),
    ):
        with pytest.raises(ValueError, match="pattern"):
            make()


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/7", "a" * 40, "release-2026_11"])
def test_revisions_are_taken(revision):
    assert ModelSpec(revision=revision).revision == revision


@pytest.mark.parametrize(
    "name", [*ESCAPES, "", ".", "./here", "~/x", "a/b/c", "org/na..me", "org/name@../x", "org/name@/x"]
)
def test_the_name_of_a_hub_data_set_is_never_a_path_that_the_library_would_read(name):
    found, problems = find_sources(DataSpec(source=[f"hub:{name}"]))
    assert found == [] and problems[0].what == "no name of a data set on the hub"


@pytest.mark.parametrize("name", ["x\\..\\..\\x.jsonl", "a\0b.jsonl", f"{'x' * 400}.jsonl", "a:b\n.jsonl", "~.jsonl"])
def test_a_download_has_its_own_folder_whatever_its_server_calls_it(tmp_path, name):
    server = fsspec.filesystem("memory")
    server.pipe(f"/served/{name}", b"{}")
    try:
        sources, problems = find_sources(DataSpec(source=["memory://served"]))
        (copy,) = local_copies(Store(tmp_path), sources)
    finally:
        server.rm("/served", recursive=True)
    file = Path(copy.address)
    assert not problems and file.read_text() == "{}" and file.suffix == ".jsonl"
    assert file.parent.parent == tmp_path / "store" / "downloads"
