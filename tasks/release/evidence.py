"""The folder `evidence` of a version: why it may be trusted, and what makes it again, in files that need no store."""

import shutil
from pathlib import Path

from ruamel.yaml import YAML

from data_contracts.data_reports import Report
from data_contracts.lineage import EVIDENCE, LINEAGE_FILE, Lineage
from tasks.release.lineage import Made, file_digests, lineage_of
from tasks.release.model_card import CARD_FILE, FIGURES, model_card
from tasks.release.sbom import sbom
from tasks.reporting.mlflow_run import SPEC_FILE
from tasks.reporting.plots import figures

SBOM_FILE = "sbom.cdx.json"


def write_evidence(made: Made, folder: Path, artifacts: dict[str, Path], trained_rows_sha256: str) -> Path:
    """Write the folder `evidence` into `folder` and return it. artifacts: the version's other files and folders.

    lineage.json comes last: it names the sha256 of all others.
    """
    out = folder / EVIDENCE
    (out / FIGURES).mkdir(parents=True)
    lineage = lineage_of(made, trained_rows_sha256)
    _write_reports(made, out)
    YAML(typ="safe").dump(lineage.spec, out / SPEC_FILE)
    (out / "environment.txt").write_text(_environment(lineage))
    (out / SBOM_FILE).write_text(sbom(lineage))
    drawn = figures(made.arms, made.comparison)
    for name, figure in drawn.items():
        figure.savefig(out / FIGURES / f"{name}.png", metadata={"Software": None})
    (out / CARD_FILE).write_text(model_card(made, lineage, list(drawn)), encoding="utf-8")
    files = file_digests({**artifacts, EVIDENCE: out})
    (out / LINEAGE_FILE).write_text(lineage.model_copy(update={"files": files}).model_dump_json(indent=1))
    return out


def _write_reports(made: Made, out: Path) -> None:
    reports: dict[str, Report] = {
        "gate": made.gate, "comparison": made.comparison, "evaluation": made.scores, "dataset": made.dataset,
        "training": made.arm,
    }  # fmt: skip
    for name, report in reports.items():
        (out / f"{name}.json").write_text(report.model_dump_json(indent=1), encoding="utf-8")
    shutil.copyfile(made.store.path(made.dataset.contract_result), out / "contract.json")
    (out / "items").mkdir()
    for name in ("samples", "facts"):
        shutil.copyfile(made.store.path(getattr(made.scores, name)), out / "items" / f"{name}.jsonl")


def _environment(lineage: Lineage) -> str:
    """A lock that pip reads; Tunegate itself comes from its commit, not from an index."""
    machine, code = lineage.machine, lineage.code
    came = f"commit {code.commit}{', with changes' if code.dirty else ''}" if code.commit else "an installed package"
    head = f"# Python {machine.python}, {machine.platform}; tunegate {code.version} from {came}\n"
    pins = (f"{name}=={version}\n" for name, version in machine.packages.items() if name != "tunegate")
    return head + "".join(pins)
