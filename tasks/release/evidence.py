"""The folder `evidence` of a version: why it may be trusted, and what makes it again, in files that need no store."""

import html
import shutil
import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML

from data_contracts.data_reports import Report
from data_contracts.lineage import EVIDENCE, LINEAGE_FILE, Lineage
from tasks.data.ingestion.licences import UNKNOWN_LICENCE, distribution_licence
from tasks.release.lineage import Registration, file_digests, lineage_of
from tasks.reporting.markdown import environment, escape
from tasks.reporting.plots import figures
from tasks.reporting.sentences import label_of, sentences, start_sentence
from tasks.reporting.tables import cost_rows, models_by_name, score_rows
from tasks.runtime.mlflow_client import SPEC_FILE

if TYPE_CHECKING:
    from cyclonedx.model.component import Component, ComponentType


SBOM_FILE = "sbom.cdx.json"


def write_evidence(
    registration: Registration, folder: Path, artifacts: dict[str, Path], trained_rows_sha256: str
) -> Path:
    """Write the folder `evidence` into `folder` and return it. artifacts: the version's other files and folders.

    lineage.json comes last: it names the sha256 of all others.
    """
    out = folder / EVIDENCE
    (out / FIGURES).mkdir(parents=True)
    lineage = lineage_of(registration, trained_rows_sha256)
    _write_reports(registration, out)
    YAML(typ="safe").dump(lineage.spec, out / SPEC_FILE)
    (out / "environment.txt").write_text(_environment(lineage))
    (out / SBOM_FILE).write_text(sbom(lineage))
    drawn = figures(registration.result.arms, registration.result.comparison)
    for name, figure in drawn.items():
        figure.savefig(out / FIGURES / f"{name}.png", metadata={"Software": None})
    (out / CARD_FILE).write_text(model_card(registration, lineage, list(drawn)), encoding="utf-8")
    files = file_digests({**artifacts, EVIDENCE: out})
    (out / LINEAGE_FILE).write_text(lineage.model_copy(update={"files": files}).model_dump_json(indent=1))
    return out


def _write_reports(registration: Registration, out: Path) -> None:
    reports: dict[str, Report] = {
        "gate": registration.result.gate, "comparison": registration.result.comparison, "evaluation": registration.result.scores, "dataset": registration.result.dataset,
        "training": registration.arm,
    }  # fmt: skip
    for name, report in reports.items():
        (out / f"{name}.json").write_text(report.model_dump_json(indent=1), encoding="utf-8")
    shutil.copyfile(registration.store.path(registration.result.dataset.contract_result), out / "contract.json")
    (out / "items").mkdir()
    for name in ("samples", "facts"):
        shutil.copyfile(
            registration.store.path(getattr(registration.result.scores, name)), out / "items" / f"{name}.jsonl"
        )


def _environment(lineage: Lineage) -> str:
    """A lock that pip reads; Tunegate itself comes from its commit, not from an index."""
    machine, code = lineage.machine, lineage.code
    came = f"commit {code.commit}{', with changes' if code.dirty else ''}" if code.commit else "an installed package"
    head = f"# Python {machine.python}, {machine.platform}; tunegate {code.version} from {came}\n"
    pins = (f"{name}=={version}\n" for name, version in machine.packages.items() if name != "tunegate")
    return head + "".join(pins)


CARD_FILE = "README.md"
FIGURES = "figures"
_METRICS = {"nll_nats": "held-out loss, nats per token", "bits_per_byte": "bits per byte", "accuracy": "accuracy"}


def model_card(registration: Registration, lineage: Lineage, plots: Sequence[str]) -> str:
    """plots: names of the pictures next to it, in the folder of figures."""
    from markupsafe import Markup

    models = models_by_name(registration.result.arms, registration.result.evaluations)
    # The lineage itself names the card's sha256; packages have a file of their own.
    lineage_json = lineage.model_dump_json(indent=1, exclude={"files": True, "spec": True, "machine": {"packages"}})
    body = environment(escape).get_template("card.md.j2").render(
        arm=registration.arm,
        result=registration.result,
        lineage=lineage,
        start=start_sentence(registration.arm.start) if registration.arm.start else "starts from scratch",
        names=[label_of(name) for name in models],
        tables=(score_rows(models, registration.result.comparison), cost_rows(models)),
        sentences=list(sentences(registration.result.comparison)),
        plots={name: Markup(f"{FIGURES}/{name}.png") for name in plots},
        lineage_json=Markup(html.escape(lineage_json, quote=False)),
    )  # fmt: skip
    return f"---\n{_head(registration, lineage)}\n---\n{body}"


def _head(registration: Registration, lineage: Lineage) -> str:
    """As huggingface_hub reads it. A base that is no hub id has no place there."""
    from huggingface_hub import ModelCardData

    is_adapter = lineage.training.method != "full"
    data = ModelCardData(
        license=lineage.base_licence.lower() if " " not in lineage.base_licence else "other",
        base_model=lineage.base.name if lineage.base.revision else None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["tunegate", lineage.training.method],
        model_name=lineage.name,
        eval_results=list(_results(registration, lineage)),
    )
    return str(data.to_yaml())


def _results(registration: Registration, lineage: Lineage) -> Iterator[Any]:
    from huggingface_hub import EvalResult

    for metric, name in _METRICS.items():
        value = getattr(registration.result.scores, metric)
        if value is not None:
            yield EvalResult(
                task_type="text-generation",
                dataset_type="held-out-rows",
                dataset_name=f"{lineage.name}, test split",
                dataset_revision=lineage.data.test_sha256,
                metric_type=metric,
                metric_name=name,
                metric_value=value,
            )


_SPACE = uuid.UUID("6f3b8f5e-0c1d-4a57-9f0e-4e5a3c1f7a10")  # ours: the same version gets the same serial number


def sbom(lineage: Lineage) -> str:
    """The bill as JSON, version 1.6 of the standard. The same lineage gives the same bill."""
    from cyclonedx.model.bom import Bom
    from cyclonedx.output.json import JsonV1Dot6

    model = _model(lineage)
    parts = [_base(lineage), _data(lineage), *_packages(lineage)]
    bill = Bom(components=parts, serial_number=uuid.uuid5(_SPACE, lineage.key))
    bill.metadata.component = model
    bill.metadata.timestamp = datetime.fromtimestamp(lineage.made_unix_seconds, UTC)
    bill.register_dependency(model, parts)
    return str(JsonV1Dot6(bill).output_as_string(indent=1))


def _model(lineage: Lineage) -> "Component":
    from cyclonedx.model.component import ComponentType

    sha256 = lineage.training.adapter.sha256
    return _named(ComponentType.MACHINE_LEARNING_MODEL, lineage.name, sha256[:12], sha256, lineage.base_licence)


def _base(lineage: Lineage) -> "Component":
    from cyclonedx.model.component import ComponentType

    base = lineage.base
    version = base.revision or base.digest[:12]
    return _named(ComponentType.MACHINE_LEARNING_MODEL, base.name, version, base.digest, lineage.base_licence)


def _data(lineage: Lineage) -> "Component":
    from cyclonedx.model.component import ComponentType

    data = lineage.data
    name = ", ".join(sorted(data.sources)) or "rows"
    return _named(ComponentType.DATA, name, data.snapshot_id[:12], data.snapshot_id, data.licence)


def _named(kind: "ComponentType", name: str, version: str, sha256: str, licence: str) -> "Component":
    """sha256: of a file, or of what a folder or a snapshot holds."""
    from cyclonedx.contrib.license.factories import LicenseFactory
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.component import Component

    return Component(
        type=kind,
        name=name,
        version=version,
        bom_ref=f"{kind.value}:{name}@{version}",
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=sha256)],
        licenses=[LicenseFactory().make_from_string(licence)],
    )


def _packages(lineage: Lineage) -> Iterator["Component"]:
    from cyclonedx.contrib.license.factories import LicenseFactory
    from cyclonedx.model.component import Component
    from packageurl import PackageURL

    licences = LicenseFactory()
    for name, version in lineage.machine.packages.items():
        address = PackageURL(type="pypi", name=name, version=version)
        licence = distribution_licence(name)
        known = [] if licence == UNKNOWN_LICENCE else [licences.make_from_string(licence)]
        yield Component(name=name, version=version, bom_ref=str(address), purl=address, licenses=known)
