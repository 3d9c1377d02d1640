"""A trained arm becomes a model version: its adapter, what loads it, and its evidence, in one step or not at all."""

import json
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_contracts.data_reports import FileRef
from data_contracts.lineage import EVIDENCE, LINEAGE_FILE, LINEAGE_TAG, Lineage
from data_contracts.reports import ModelVersion
from tasks.data.curation.trained_rows import ids_of, publish_ids
from tasks.models.integrity import CODE_FILE, spec_digest
from tasks.release.evidence import write_evidence
from tasks.release.lineage import Registration
from tasks.release.registry import (
    CHALLENGER,
    EXAMPLE,
    QUANTISATION_TAG,
    SCRATCH,
    SPEC_TAG,
    STARTED_TAG,
    TRAINED_TAG,
    version_now,
)
from tasks.reporting.mlflow_run import log_model_scores
from tasks.runtime.mlflow_client import KEY_TAG, attach_file, connect, open_experiment, resumed
from tasks.runtime.store import digest, without_place

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.models import Model

_CODE = Path(__file__).parent / "workers" / CODE_FILE


def register_version(registration: Registration) -> ModelVersion:
    """Make the arm a new version under alias `challenger`; the version of the same key is used again."""
    store, name = registration.spec.store, registration.spec.model.name
    client = connect(store)
    open_experiment(client, store, name)
    found = client.search_model_versions(f"name = '{name}' and tags.`{KEY_TAG}` = '{registration.key}'")
    version = str(found[0].version) if found else _make_version(client, registration)
    client.set_registered_model_alias(name, CHALLENGER, version)
    run_id = registration.recorded.arm_run_ids[registration.arm.name]
    return version_now(store, ModelVersion(name=name, version=version, aliases=[], run_id=run_id))


def _make_version(client: "MlflowClient", registration: Registration) -> str:
    name, run_id = registration.spec.model.name, registration.recorded.arm_run_ids[registration.arm.name]
    trained = _trained_rows(registration)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        artifacts = {
            "adapter": registration.store.path(registration.arm.adapter.folder),
            "trained_rows": registration.store.path(trained),
        }
        artifacts["meta"] = folder / "meta.json"
        artifacts["meta"].write_text(json.dumps(_meta(registration), indent=1))
        artifacts[EVIDENCE] = write_evidence(registration, folder, artifacts, trained.sha256)
        with resumed(run_id):
            model_id = _log_model(artifacts)
            log_model_scores(registration.store, model_id, registration.result.scores, registration.result.dataset.test)
        lineage_file = artifacts[EVIDENCE] / LINEAGE_FILE
        attach_file(registration.spec.store, registration.recorded.mlflow_run_id, lineage_file)
        lineage, sha256 = Lineage.model_validate_json(lineage_file.read_bytes()), digest(lineage_file)
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    # Tags come with the version, not after it: a version without its evidence cannot exist.
    tags = _tags(registration, lineage, trained) | {LINEAGE_TAG: sha256}
    source = f"models:/{model_id}"
    return str(client.create_model_version(name, source, run_id=run_id, tags=tags, model_id=model_id).version)


def _trained_rows(registration: Registration) -> FileRef:
    """Ids of all rows the arm has seen. They go with the version: a later warm start must know them, whatever the store
    still has."""
    start = registration.arm.start
    if start and start.trained:
        return start.trained
    return publish_ids(registration.store, ids_of(registration.store.path(registration.result.dataset.train)))


def _meta(registration: Registration) -> dict[str, Any]:
    """What served_model.py needs to know to load the version as it was evaluated, and to refuse anything else."""
    base, arm = registration.result.base, registration.arm
    return {
        "code_sha256": digest(_CODE),
        "adapter_files": {
            file.name: digest(file) for file in sorted(registration.store.path(arm.adapter.folder).iterdir())
        },
        "base": without_place(base.name),
        "base_digest": base.digest,
        "base_path": base.path,
        "base_revision": base.revision,
        "method": arm.method,
        "quantisation": arm.quantisation.model_dump() if arm.quantisation else None,
        "precision": arm.precision,
        "system_prompt": registration.spec.data.system_prompt,
        "stops": base.stops,
        "chat_template": base.chat_template,
    }


def _tags(registration: Registration, lineage: Lineage, trained: FileRef) -> dict[str, str]:
    """What versions are searched by."""
    arm, code = registration.arm, lineage.code
    tags = {
        KEY_TAG: registration.key,
        SPEC_TAG: spec_digest(registration.spec.model_dump(mode="json", exclude={"store"})),
        "tunegate.method": arm.method,
        "tunegate.seed": f"{arm.seed}",
        "tunegate.adapter_sha256": arm.adapter.sha256,
        "tunegate.base": lineage.base.name,
        "tunegate.base_digest": lineage.base.digest,
        "tunegate.base_licence": lineage.base_licence,
        "tunegate.snapshot": lineage.data.snapshot_id,
        "tunegate.data_licence": lineage.data.licence,
        "tunegate.items_sha256": lineage.judgement.items_sha256,
        "tunegate.verdict": registration.result.gate.verdict,
        "tunegate.run": registration.recorded.mlflow_run_id,
        "tunegate.nll_nats": f"{registration.result.scores.nll_nats}",
        "tunegate.commit": f"{code.commit or 'none'}{'-dirty' if code.dirty else ''}",
        STARTED_TAG: (arm.start.version if arm.start else None) or SCRATCH,
        TRAINED_TAG: trained.sha256,
    }
    return tags | ({QUANTISATION_TAG: arm.quantisation.model_dump_json()} if arm.quantisation else {})


def _log_model(artifacts: dict[str, Path]) -> str:
    """MLflow's id of the logged model. A crash after this leaves one that no version points at."""
    from mlflow.models import Model, infer_signature

    # MLflow turns its own hints on again in there, whatever is filtered: recorded, they do not reach the terminal.
    with warnings.catch_warnings(record=True):
        info = Model.log(
            artifact_path=None,
            name="model",
            flavor=_WithoutPlaces,
            flavor_name="pyfunc",
            python_model=str(_CODE),
            artifacts={name: str(path) for name, path in artifacts.items()},
            signature=infer_signature([EXAMPLE], ["..."], params={"max_new_tokens": 64}),
            input_example=[EXAMPLE],
            # MLflow would load the model in here to try the example, and only warn; `load_back` is the check that counts.
            validate_serving_input=False,
            pip_requirements=["mlflow", "torch", "transformers", "peft", "bitsandbytes", "accelerate"],
        )
    return str(info.model_id)


class _WithoutPlaces:
    """MLflow's flavour pyfunc, but MLmodel does not name the folders of this machine that the files came from."""

    @staticmethod
    def save_model(path: str, mlflow_model: "Model", **arguments: Any) -> None:
        import mlflow

        arguments.pop("validate_serving_input")  # meant for Model.log, which passes on all that it gets
        mlflow.pyfunc.save_model(path=path, mlflow_model=mlflow_model, **arguments)
        flavor = mlflow_model.flavors["python_function"]
        flavor["model_code_path"] = _CODE.name
        for artifact in flavor["artifacts"].values():
            artifact["uri"] = artifact["path"]
        place, mlflow_model.artifact_path = mlflow_model.artifact_path, None
        mlflow_model.save(str(Path(path) / "MLmodel"))
        mlflow_model.artifact_path = place
