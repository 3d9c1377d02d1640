"""The lineage of a version: collected at registration, verified against its tag when read."""

import platform
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

from data_contracts.errors import ConfigError, Problem, StoreError
from data_contracts.lineage import (
    EVIDENCE,
    LINEAGE_FILE,
    LINEAGE_TAG,
    Code,
    DataLineage,
    Judgement,
    Lineage,
    Machine,
    Training,
)
from data_contracts.reports import RecordedRun, TrainReport
from data_contracts.run_spec import RunSpec
from data_contracts.stage_inputs import RunResult
from data_contracts.train_spec import arms_of
from tasks.data.curation.row_ledger import fates_sha256
from tasks.data.ingestion.licences import data_licence
from tasks.runtime.store import Store, digest, without_place

_ROOT = Path(__file__).parents[2]
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
_PACKAGES = ("flows", "tasks", "data_contracts")


@dataclass(frozen=True)
class Registration:
    """All that a version comes from. key: of the register stage; code: digest of the train stage's."""

    spec: RunSpec
    result: RunResult
    recorded: RecordedRun
    key: str
    code: str

    @property
    def store(self) -> Store:
        return Store.of(self.spec.store)

    @property
    def arm(self) -> TrainReport:
        """The trained arm that becomes the version."""
        return self.result.candidate


def lineage_of(registration: Registration, trained_rows_sha256: str) -> Lineage:
    """Everything but the digests of the files, which are not written yet."""
    result = registration.result
    return Lineage(
        name=registration.spec.model.name,
        key=registration.key,
        run=registration.recorded.mlflow_run_id,
        made_unix_seconds=time.time(),
        spec=placeless(registration.spec),
        base=result.base.model_copy(update={"name": without_place(result.base.name)}),
        base_licence=result.base.licence,
        data=_data(registration, trained_rows_sha256),
        training=_training(registration),
        judgement=Judgement(
            verdict=result.gate.verdict,
            items_sha256=result.scores.items_sha256,
            nll_nats=result.scores.nll_nats,
            candidate=result.comparison.candidate,
            champion=result.champion,
        ),
        code=code_now(registration.code),
        machine=machine_now(registration.arm),
        files={},
    )


def _data(registration: Registration, trained_rows_sha256: str) -> DataLineage:
    data = registration.result.dataset
    return DataLineage(
        snapshot_id=data.snapshot_id,
        sources={source.name: source.sha256 for source in data.sources},
        source_rows={source.name: source.rows for source in data.sources},
        ledger_sha256=fates_sha256(registration.store, registration.spec.model.name, data.snapshot_id),
        train_sha256=data.train.sha256,
        validation_sha256=data.validation.sha256,
        test_sha256=data.test.sha256,
        trained_rows_sha256=trained_rows_sha256,
        contract_sha256=data.contract_result.sha256,
        rows_in=data.rows_in,
        rows_kept=data.kept,
        licence=data_licence(registration.spec.data),
    )


def _training(registration: Registration) -> Training:
    arm = registration.arm
    settings = next(own.settings for own in arms_of(registration.spec.train) if own.name == arm.name)
    return Training(
        name=arm.name,
        method=arm.method,
        quantisation=arm.quantisation,
        seed=arm.seed,
        adapter=arm.adapter,
        step0_sha256=arm.step0_sha256,
        start=arm.start,
        settings=settings.model_dump(mode="json"),
    )


def placeless(spec: RunSpec) -> dict[str, Any]:
    """The spec without its store, and without folders of this machine: of a path that begins at the root or at home only
    the last part stays."""
    plain = spec.model_dump(mode="json", exclude={"store"})
    plain["data"]["source"] = [without_place(entry) for entry in spec.data.source]
    for section, setting in (
        ("model", "base"), ("contract", "suite"), ("contract", "batch_suite"), ("rules", "function"),
        ("evaluate", "task_folder"),
    ):  # fmt: skip
        if plain[section][setting]:
            plain[section][setting] = without_place(plain[section][setting])
    return plain


# --- now ----------------------------------------------------------------------------------------------------


def code_now(train_code: str) -> Code:
    """The code that runs. commit: only of a checkout of Tunegate itself, not of one that it is installed in."""
    own = _git("rev-parse", "--show-toplevel") == str(_ROOT.resolve())
    changed = _git("status", "--porcelain", "--", *_PACKAGES) if own else None
    return Code(
        version=version("tunegate"),
        commit=_git("rev-parse", "HEAD") if own else None,
        dirty=None if changed is None else bool(changed),
        digest=train_code,
    )


def _git(*arguments: str) -> str | None:
    """What git says of the folder of this code; None without git or without a repository."""
    try:
        done = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def machine_now(arm: TrainReport) -> Machine:
    """This machine, and how the arm was trained on it."""
    return Machine(
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        processor=processor(),
        device=f"{arm.device}, {accelerator()}" if arm.device == "cuda" else arm.device,
        precision=arm.precision,
        threads=arm.threads,
        packages=packages(),
    )


def packages() -> dict[str, str]:
    """Every installed distribution by its normalised name, and its version."""
    whole = [item for item in distributions() if "Name" in item.metadata]  # one half removed has no name
    found = {re.sub(r"[-_.]+", "-", item.metadata["Name"]).lower(): item.version for item in whole}
    return dict(sorted(found.items()))


def processor() -> str:
    """The name of the processor, and which of the instructions it has that arithmetic is done by."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name") or platform.processor() or platform.machine()
    known = [flag for flag in _INSTRUCTIONS if flag in fields.get("flags", "").split()]
    return f"{name} ({', '.join(known)})" if known else name


def accelerator() -> str:
    """The names of the GPUs, as nvidia-smi lists them."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return "unknown GPU"
    return ", ".join(sorted(set(done.stdout.strip().splitlines())))


# --- files --------------------------------------------------------------------------------------------------


def file_digests(artifacts: dict[str, Path]) -> dict[str, str]:
    """sha256 of every file of these files and folders, by its path in the version's artifacts."""
    return dict(sorted(_digests(artifacts)))


def _digests(artifacts: dict[str, Path]) -> Iterator[tuple[str, str]]:
    for path in artifacts.values():
        for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
            yield file.relative_to(path.parent).as_posix(), digest(file)


def read_lineage(artifacts: Path, tags: dict[str, str], label: str) -> Lineage:
    """A version's lineage, if it is the file that its tag names. Raises ConfigError if the version has none, StoreError if it
    is another one."""
    wanted = tags.get(LINEAGE_TAG)
    if wanted is None:
        what = f"{label} has no lineage: it was registered before versions carried one"
        raise ConfigError(Problem(what, LINEAGE_TAG, act="train it again: tunegate run"))
    file = artifacts / EVIDENCE / LINEAGE_FILE
    found = digest(file) if file.exists() else "no file"
    if found != wanted:
        what = f"{LINEAGE_FILE} of {label} is not the file that was registered ({found[:12]} instead of {wanted[:12]})"
        raise StoreError(Problem(what, EVIDENCE, act="restore the registry's artifacts from a backup"))
    return Lineage.model_validate_json(file.read_bytes())
