"""Model versions: registered with their evidence, loaded back in a fresh process, found by name or alias."""

import json
import re
import shutil
import tempfile
import uuid
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from data_contracts.data_reports import DatasetManifest, FileRef
from data_contracts.errors import ConfigError, Problem, StoreError
from data_contracts.reports import (
    BaseModelRef,
    EvalReport,
    LoadedBack,
    ModelVersion,
    Quantisation,
    RecordedRun,
    TrainReport,
)
from data_contracts.run_spec import Method, RunSpec, StoreSpec
from data_contracts.verdict import GateReport
from tasks.integrity import CODE_FILE, verify_version
from tasks.processes import run_worker
from tasks.row_ids import NAME, ids_of, publish_ids
from tasks.stores import Store, digest
from tasks.tracking import KEY_TAG, SPEC_FILE, connect, open_experiment, resumed

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion as MlflowVersion

CHAMPION, CHALLENGER = "champion", "challenger"
_CODE = Path(__file__).parent / "workers" / CODE_FILE
_EXAMPLE = "What do you know?"
_MODEL_NAME = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9._-]*"
)  # of model.name: it stands in filters, where a quote would end it
_QUANTISATION_TAG = "tunegate.quantisation"
STARTED_TAG, TRAINED_TAG = "tunegate.started_from", "tunegate.trained_rows"
_SCRATCH = "scratch"
_NF4 = Quantisation(quant_type="nf4", double_quant=True)  # of versions from before there was a choice


@dataclass(frozen=True)
class Registered:
    """A version as the registry knows it, with where its adapter lies."""

    name: str
    version: str
    method: Method
    quantisation: Quantisation | None
    adapter: str
    adapter_sha256: str
    base_digest: str
    verdict: str
    run_id: str
    started_from: str | None = None  # the version whose adapter its training went on from; None: from scratch
    trained: FileRef | None = None  # ids of the rows it was trained on, at an absolute path; None: not recorded

    @property
    def label(self) -> str:
        return f"{self.name} version {self.version}"

    @property
    def folder(self) -> Path:
        """The version's files as MLflow keeps them, or has downloaded them."""
        return Path(self.adapter).parent.parent


def register_version(
    spec: RunSpec,
    key: str,
    base: BaseModelRef,
    arm: TrainReport,
    scores: EvalReport,
    dataset: DatasetManifest,
    gate: GateReport,
    recorded: RecordedRun,
) -> ModelVersion:
    """Make the arm a new version under alias `challenger`; the version of the same key is used again."""
    client = connect(spec.store)
    name = spec.model.name
    open_experiment(client, spec.store, name)
    found = client.search_model_versions(f"name = '{name}' and tags.`{KEY_TAG}` = '{key}'")
    trained = _trained_rows(Store(Path(spec.store.root)), arm, dataset)
    tags = {
        KEY_TAG: key,
        "tunegate.method": arm.method,
        "tunegate.adapter_sha256": arm.adapter.sha256,
        "tunegate.base": base.name,
        "tunegate.base_digest": base.digest,
        "tunegate.snapshot": dataset.snapshot_id,
        "tunegate.verdict": gate.verdict,
        "tunegate.run": recorded.mlflow_run_id,
        "tunegate.nll_nats": f"{scores.nll_nats}",
        STARTED_TAG: (arm.start.version if arm.start else None) or _SCRATCH,
        TRAINED_TAG: trained.sha256,
    }
    if arm.quantisation:
        tags[_QUANTISATION_TAG] = arm.quantisation.model_dump_json()
    run_id = recorded.arm_run_ids[arm.name]
    meta = _meta(spec, base, arm)
    version = str(found[0].version) if found else _make_version(client, spec, run_id, meta, arm, trained, tags)
    client.set_registered_model_alias(name, CHALLENGER, version)
    return version_now(spec.store, ModelVersion(name=name, version=version, aliases=[], run_id=run_id))


def _trained_rows(store: Store, arm: TrainReport, dataset: DatasetManifest) -> FileRef:
    """Ids of all rows the arm has seen. They go with the version: a later warm start must know them, whatever the store
    still has."""
    if arm.start and arm.start.trained:
        return arm.start.trained
    return publish_ids(store, ids_of(store.path(dataset.train)))


def _meta(spec: RunSpec, base: BaseModelRef, arm: TrainReport) -> dict[str, Any]:
    """What served_model.py needs to know to load the version as it was evaluated, and to refuse anything else."""
    adapter = Store(Path(spec.store.root)).path(arm.adapter.folder)
    return {
        "code_sha256": digest(_CODE),
        "adapter_files": {file.name: digest(file) for file in sorted(adapter.iterdir())},
        "base": base.name,
        "base_digest": base.digest,
        "base_path": base.path,
        "base_revision": base.revision,
        "method": arm.method,
        "quantisation": arm.quantisation.model_dump() if arm.quantisation else None,
        "precision": arm.precision,
        "system_prompt": spec.data.system_prompt,
        "stops": base.stops,
        "chat_template": base.chat_template,
    }


def _make_version(
    client: "MlflowClient", spec: RunSpec, run_id: str, meta: dict[str, Any], arm: TrainReport, trained: FileRef,
    tags: dict[str, str],
) -> str:  # fmt: skip
    import mlflow
    from mlflow.models import infer_signature

    store = Store(Path(spec.store.root))
    adapter, rows = store.path(arm.adapter.folder), store.path(trained)
    # MLflow turns its own hints on again in there, whatever is filtered: recorded, they do not reach the terminal.
    with tempfile.TemporaryDirectory() as folder, resumed(run_id), warnings.catch_warnings(record=True):
        meta_file = Path(folder) / "meta.json"
        meta_file.write_text(json.dumps(meta, indent=1))
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(_CODE),
            artifacts={"adapter": str(adapter), "meta": str(meta_file), "trained_rows": str(rows)},
            signature=infer_signature([_EXAMPLE], ["..."], params={"max_new_tokens": 64}),
            # MLflow tries it only where it finds the base, and only warns; `load_back` is the check that counts.
            input_example=[_EXAMPLE],
            pip_requirements=["mlflow", "torch", "transformers", "peft", "bitsandbytes", "accelerate"],
        )
    name, source = spec.model.name, f"models:/{info.model_id}"
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    # Tags come with the version, not after it: a version without its evidence cannot exist.
    made = client.create_model_version(name, source, run_id=run_id, tags=tags, model_id=info.model_id)
    return str(made.version)


def ask_version(store: StoreSpec, uri: str, questions: list[str], max_new_tokens: int) -> list[str]:
    """Load a version in a fresh process and put questions to it. The files that were verified are the ones it loads."""
    place, version = Store(Path(store.root)), resolve(store, uri)
    spec = {
        "tracking_uri": store.mlflow_uri or place.database_uri,
        "model": str(version.folder),
        "label": version.label,
        "store": str(place.root.resolve()),
        "questions": questions,
        "max_new_tokens": max_new_tokens,
    }
    out = place.files / "asks" / uuid.uuid4().hex
    answers = run_worker("tasks.workers.ask_model", spec, out)["answers"]
    shutil.rmtree(out)  # only a failed one is kept, with its log
    return [str(answer) for answer in answers]


def load_back(store: StoreSpec, model: ModelVersion, scores: EvalReport, sample_tokens: int) -> LoadedBack:
    """Ask the registered version what was asked in the evaluation. Raises StoreError if it answers nothing."""
    sample = scores.answers[0] if scores.answers else None
    question = sample.question if sample else _EXAMPLE
    uri = f"models:/{model.name}/{model.version}"
    (answer,) = ask_version(store, uri, [question], sample_tokens)
    if not answer and (sample is None or sample.answer):
        raise StoreError(
            Problem("the registered model answers nothing", uri, act="it was not promoted; look at its run")
        )
    return LoadedBack(question=question, answer=answer, as_evaluated=answer == sample.answer if sample else None)


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


def recorded_spec(store: StoreSpec, version: Registered) -> str:
    """Path of the spec file of the run that made a version."""
    return str(connect(store).download_artifacts(version.run_id, SPEC_FILE))


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
        adapter=str(files / "adapter"),
        adapter_sha256=tags["tunegate.adapter_sha256"],
        base_digest=tags["tunegate.base_digest"],
        verdict=tags["tunegate.verdict"],
        run_id=tags["tunegate.run"],
        started_from=None if tags.get(STARTED_TAG, _SCRATCH) == _SCRATCH else tags[STARTED_TAG],
        trained=FileRef(path=str(files / NAME), sha256=tags[TRAINED_TAG]) if TRAINED_TAG in tags else None,
    )


def _quantisation(tags: dict[str, str]) -> Quantisation | None:
    if tags["tunegate.method"] != "qlora":
        return None
    told = tags.get(_QUANTISATION_TAG)
    return Quantisation.model_validate_json(told) if told else _NF4


def offer(client: "MlflowClient", name: str) -> str:
    """What the registry has instead, for the end of an error."""
    versions = client.search_model_versions(f"name = '{name}'")
    if versions:
        return f"{name} has versions {', '.join(sorted(str(v.version) for v in versions))}"
    names = sorted(model.name for model in client.search_registered_models())
    return f"registered models: {', '.join(names)}" if names else "nothing is registered in this store yet"


def version_now(store: StoreSpec, model: ModelVersion) -> ModelVersion:
    """The version with the aliases it has at this moment."""
    found = connect(store).get_model_version(model.name, model.version)
    return model.model_copy(update={"aliases": sorted(found.aliases)})
