"""Model versions, found by name or alias and asked in a fresh process. How one is made: tasks/release/register.py."""

import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from data_contracts.data_reports import FileRef
from data_contracts.errors import ConfigError, Problem
from data_contracts.jobs.release import AskJob, AskReport, LoadJob
from data_contracts.lineage import Lineage
from data_contracts.releases import OVERRIDE_TAG
from data_contracts.reports import AdapterRef, ModelVersion, Quantisation
from data_contracts.run_spec import StoreSpec
from data_contracts.train_spec import Method
from tasks.data.curation.trained_rows import TRAINED_ROWS_FILE
from tasks.models.integrity import checked_spec, verify_version
from tasks.release.lineage import read_lineage
from tasks.runtime.mlflow_client import SPEC_FILE, connect
from tasks.runtime.processes import run_worker
from tasks.runtime.store import Store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion as MlflowVersion

CHAMPION, CHALLENGER = "champion", "challenger"
EXAMPLE = "What do you know?"
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # it stands in filters, where a quote would end it
QUANTISATION_TAG = "tunegate.quantisation"
SPEC_TAG = "tunegate.spec_sha256"
STARTED_TAG, TRAINED_TAG = "tunegate.started_from", "tunegate.trained_rows"
SCRATCH = "scratch"
_NF4 = Quantisation(quant_type="nf4", double_quant=True)  # of versions from before there was a choice


@dataclass(frozen=True)
class Registered:
    """A version as the registry knows it. Its adapter's folder is an absolute path: MLflow's, or where it was downloaded."""

    name: str
    version: str
    method: Method
    quantisation: Quantisation | None
    adapter: AdapterRef
    base_digest: str
    verdict: str
    run_id: str
    started_from: str | None = None  # the version whose adapter its training resumed from; None: from scratch
    spec_sha256: str | None = None  # None: registered before it was kept
    trained: FileRef | None = None  # ids of the rows it was trained on, at an absolute path; None: not recorded
    override: str = ""  # why it became champion although something said no

    @property
    def label(self) -> str:
        return f"{self.name} version {self.version}"

    @property
    def artifacts(self) -> Path:
        """Folder of the adapter, the evidence and the rows' ids."""
        return Path(self.adapter.folder).parent

    @property
    def folder(self) -> Path:
        """The version's files as MLflow keeps them, or has downloaded them."""
        return self.artifacts.parent


def load_job(store: StoreSpec, version: Registered) -> LoadJob:
    """What a worker needs to load a version as anybody does. The files that were verified are the ones it loads."""
    place = Store.of(store)
    return LoadJob(
        tracking_uri=store.mlflow_uri or place.database_uri,
        model=str(version.folder),
        label=version.label,
        store=str(place.root.resolve()),
    )


def ask_version(store: StoreSpec, uri: str, questions: list[str], max_new_tokens: int) -> list[str]:
    """Load a version in a fresh process and put questions to it."""
    version = load_job(store, resolve(store, uri))
    job = AskJob(version=version, questions=questions, max_new_tokens=max_new_tokens)
    out = Store.of(store).files / "asks" / uuid.uuid4().hex
    report = AskReport.model_validate(run_worker("tasks.release.workers.ask_model", job, out))
    shutil.rmtree(out)  # only a failed one is kept, with its log
    return report.answers


def resolve(store: StoreSpec, uri: str, option: str = "--model") -> Registered:
    """A version by `models:/NAME/VERSION` or `models:/NAME@ALIAS`. Raises ConfigError, saying what there is."""
    from mlflow.exceptions import MlflowException

    client = connect(store)
    rest = uri.removeprefix("models:/")
    name, at, label = rest.partition("@") if "@" in rest else rest.partition("/")
    if rest == uri or not at or not label or not _MODEL_NAME.fullmatch(name):
        raise ConfigError(
            Problem(f"not a model URI: {uri!r}", option, act="models:/NAME/VERSION or models:/NAME@champion")
        )
    try:
        found = client.get_model_version_by_alias(name, label) if at == "@" else client.get_model_version(name, label)
    except MlflowException as error:
        if error.get_http_status_code() not in (400, 404):
            raise  # a server that is away says nothing about what it has
        raise ConfigError(Problem(f"the registry has no {uri}", option, act=offer(client, name))) from error
    return _registered(client, found)


def recorded_spec_file(store: StoreSpec, version: Registered) -> str:
    """Path of the spec file of the run that made a version. Raises StoreError if it was changed since."""
    file = Path(connect(store).download_artifacts(version.run_id, SPEC_FILE))
    return str(checked_spec(file, version.spec_sha256, version.label) if version.spec_sha256 else file)


def recorded_lineage(store: StoreSpec, version: Registered) -> Lineage:
    """The lineage of a version. Raises ConfigError if it has no lineage, StoreError if it is not the registered one."""
    tags = connect(store).get_model_version(version.name, version.version).tags
    return read_lineage(version.artifacts, tags, version.label)


def champion(store: StoreSpec, name: str) -> Registered | None:
    """The version in production, or None."""
    client = connect(store)
    version = alias_version(client, name, CHAMPION)
    return None if version is None else _registered(client, client.get_model_version(name, version))


def alias_version(client: "MlflowClient", name: str, alias: str) -> str | None:
    """The version an alias points at, or None. Raises ConfigError for what can be no name."""
    if not _MODEL_NAME.fullmatch(name):
        act = "give the model.name of the run that registered it"
        raise ConfigError(Problem(f"no name of a model: {name!r}", "", "letters, digits, dots, _ and -", act))
    models = client.search_registered_models(f"name = '{name}'")
    return str(models[0].aliases[alias]) if models and alias in models[0].aliases else None


def _registered(client: "MlflowClient", found: "MlflowVersion") -> Registered:
    import mlflow

    tags = found.tags
    if "tunegate.adapter_sha256" not in tags:
        raise ConfigError(Problem(f"{found.name} version {found.version} was not registered by Tunegate", "--model"))
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{found.name}/{found.version}"))
    verify_version(folder, tags, f"{found.name} version {found.version}")
    files = folder / "artifacts"
    return Registered(
        name=found.name,
        version=str(found.version),
        method=cast(Method, tags["tunegate.method"]),
        quantisation=_quantisation(tags),
        adapter=AdapterRef(folder=str(files / "adapter"), sha256=tags["tunegate.adapter_sha256"]),
        base_digest=tags["tunegate.base_digest"],
        verdict=tags["tunegate.verdict"],
        run_id=tags["tunegate.run"],
        spec_sha256=tags.get(SPEC_TAG),
        started_from=None if tags.get(STARTED_TAG, SCRATCH) == SCRATCH else tags[STARTED_TAG],
        trained=FileRef(path=str(files / TRAINED_ROWS_FILE), sha256=tags[TRAINED_TAG]) if TRAINED_TAG in tags else None,
        override=tags.get(OVERRIDE_TAG, ""),
    )


def _quantisation(tags: dict[str, str]) -> Quantisation | None:
    if tags["tunegate.method"] != "qlora":
        return None
    kept = tags.get(QUANTISATION_TAG)
    return Quantisation.model_validate_json(kept) if kept else _NF4


def offer(client: "MlflowClient", name: str) -> str:
    """What the registry has instead, as the next act of an error."""
    versions = client.search_model_versions(f"name = '{name}'")
    if versions:
        return f"{name} has versions {', '.join(sorted(str(v.version) for v in versions))}"
    names = sorted(model.name for model in client.search_registered_models())
    return f"registered models: {', '.join(names)}" if names else "nothing is registered in this store yet"


def version_now(store: StoreSpec, model: ModelVersion) -> ModelVersion:
    """The version with the aliases it has at this moment."""
    found = connect(store).get_model_version(model.name, model.version)
    return model.model_copy(update={"aliases": sorted(found.aliases)})
