"""Make a registered version again from its lineage, and say how near it came and what is not as it was."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from data_contracts.data_reports import DatasetManifest, FileRef
from data_contracts.errors import ConfigError, Problem, StoreError
from data_contracts.lineage import EVIDENCE, Code, Compared, Lineage, Machine, Reproduction, result_of
from data_contracts.reports import AdapterRef, BaseModelRef, EvalTarget, TrainReport
from data_contracts.run_spec import RunSpec
from data_contracts.train_spec import TrainSpec
from tasks.evaluation.evaluate import evaluate_targets
from tasks.models.base import ADAPTER_FILE, init_adapter, prepare_base, start_settings
from tasks.release import registry
from tasks.release.lineage import code_now, machine_now
from tasks.release.registry import Registered
from tasks.reproduction.dataset import Rows
from tasks.runtime.processes import run_worker
from tasks.runtime.store import Store, digest
from tasks.training.train import train_arm
from tasks.training.warm_start import choose_start, origin_at

_SHAPING = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "tokenizers", "safetensors", "numpy")
_NONE = "none"
_SHOWN, _LISTED = 12, 5


class Measured(NamedTuple):
    """How far apart the adapter of then and that of now lie; None: they are the same to the byte, or have no loss."""

    distance: float | None = None
    loss_then_nats: float | None = None
    loss_now_nats: float | None = None


class Begin(NamedTuple):
    """What training begins with this time. adapter: None starts from the base itself."""

    adapter: AdapterRef | None
    rows: FileRef
    compared: list[Compared]


@contextmanager
def working_place(store: Store, version: Registered) -> Iterator[Store]:
    """An empty store of its own inside the store: nothing that an earlier run left is used, and no ledger learns anything."""
    root = store.files / "reproductions" / f"{version.name}-{version.version}"
    root.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{root}.lock", timeout=0):
            shutil.rmtree(root, ignore_errors=True)
            yield Store(root)
    except Timeout as error:
        raise StoreError(
            Problem(f"{version.label} is being made again already", str(root), act="wait for it")
        ) from error


def recorded_dataset(version: Registered) -> DatasetManifest:
    """The data set as it stands in the version's evidence."""
    return DatasetManifest.model_validate_json((version.artifacts / EVIDENCE / "dataset.json").read_bytes())


def checked_adapter(version: Registered, then: Lineage) -> AdapterRef:
    """The registered adapter. Raises StoreError if it is not the file that the lineage names."""
    weights = Path(version.adapter.folder) / ADAPTER_FILE
    found = digest(weights if weights.exists() else weights.parent)
    if found != then.training.adapter.sha256:
        what = f"the adapter of {version.label} is not the one that was registered ({found[:_SHOWN]})"
        act = "restore the registry's artifacts from a backup"
        raise StoreError(Problem(what, ADAPTER_FILE, f"sha256 {then.training.adapter.sha256[:_SHOWN]}", act))
    return AdapterRef(folder=version.adapter.folder, sha256=found)


def base_again(store: Store, place: Store, spec: RunSpec, then: Lineage) -> BaseModelRef:
    """The base of then: the store's if its files are what they were, else fetched or converted again. Raises ConfigError if
    it is another one by now."""
    folder = store.files / then.base.path
    if folder.exists() and digest(folder) == then.base.digest:
        return then.base.model_copy(update={"path": str(folder.resolve())})
    made = prepare_base(place, spec.model.base, then.base.revision)
    if made.digest != then.base.digest:
        what = f"the base {then.base.name} has other files than then ({made.digest[:_SHOWN]})"
        act = "restore it, or name the folder of then: --set model.base=PATH"
        raise ConfigError(Problem(what, "model.base", f"digest {then.base.digest[:_SHOWN]}", act))
    return made


def begin_again(spec: RunSpec, place: Store, base: BaseModelRef, then: Lineage, rows: Rows) -> Begin:
    """A fresh step-0 adapter from the recorded seed; for a warm start the version's that it went on from."""
    training, train = then.training, TrainSpec.model_validate(then.training.settings)
    settings = start_settings(training.method, training.seed, train, then.machine.precision)
    adapter = init_adapter(place, base, settings, force=True) if settings else None
    used = rows.train
    if training.start and training.start.version and adapter:
        parent = registry.resolve(spec.store, f"models:/{then.name}/{training.start.version}", "reproduce")
        held_out = [rows.validation, rows.test]
        start = choose_start(place, origin_at(parent), base, adapter, rows.train, held_out, train.replay_share)
        adapter, used = start.adapter or adapter, start.rows
    compared = [
        Compared(what="base", then=then.base.digest, now=base.digest),
        Compared(what="step-0 adapter", then=training.step0_sha256 or _NONE, now=adapter.sha256 if adapter else _NONE),
    ]
    if training.start:
        compared.append(Compared(what="rows of the warm start", then=training.start.rows.sha256, now=used.sha256))
    return Begin(adapter, used, compared)


def train_again(place: Store, base: BaseModelRef, begin: Begin, rows: Rows, then: Lineage, threads: int) -> TrainReport:
    """The arm with its recorded settings, seed and precision, from the first step on."""
    training, machine = then.training, then.machine
    settings = TrainSpec.model_validate(training.settings | {"threads": threads})
    inputs = (
        training.method,
        training.seed,
        base,
        begin.adapter,
        begin.rows,
        rows.validation,
        settings,
        machine.precision,
    )
    return train_arm(place, then.key, *inputs, True, lambda event: None, training.name, None)


def compare_again(
    spec: RunSpec, place: Store, base: BaseModelRef, rows: Rows, version: Registered, then: Lineage, arm: TrainReport
) -> Measured:
    """The adapters beside each other, and their losses on the held-out rows, both measured now."""
    if arm.adapter.sha256 == then.training.adapter.sha256:
        return Measured()
    own = {"method": arm.method, "quantisation": arm.quantisation}
    adapters = {"then": checked_adapter(version, then), "now": arm.adapter}
    folders = {"then": version.adapter.folder, "now": str(place.path(arm.adapter.folder))}
    found = run_worker("tasks.reproduction.workers.compare_adapters", folders, place.files / "compared")
    targets = [EvalTarget(name=name, adapter=adapter, **own) for name, adapter in adapters.items()]
    alone = {"tasks": ["domain_nll"], "forms": [], "sample_questions": 0, "task_folder": None}
    settings = spec.evaluate.model_copy(update=alone)
    scores = evaluate_targets(
        place, base, rows.test, targets, settings, None, spec.train.max_tokens, then.machine.precision,
        spec.gates.confidence, arm.threads,
    )  # fmt: skip
    losses = {report.target: report.nll_nats for report in scores}
    return Measured(float(found["distance"]), losses["then"], losses["now"])


def told(
    uri: str, then: Lineage, arm: TrainReport, rows: Rows, begin: Begin, train_code: str, measured: Measured,
    kept: str, seconds: float,
) -> Reproduction:  # fmt: skip
    """kept: where the adapter of now lies, in the store."""
    code, machine = code_now(train_code), machine_now(arm)
    compared = [*rows.compared, *begin.compared, *_code(then.code, code), *_machine(then.machine, machine)]
    result = result_of(*measured)
    return Reproduction(
        model=uri,
        result=result,
        compared=compared,
        data=rows.told,
        adapter_then=then.training.adapter.sha256,
        adapter_now=arm.adapter.sha256,
        **measured._asdict(),
        reasons=[] if result == "identical" else _reasons(compared),
        kept=None if result == "identical" else kept,
        seconds=seconds,
    )


def _reasons(compared: list[Compared]) -> list[str]:
    found = [
        f"{item.what}: {item.then[:40]} then, {item.now[:40]} now"
        for item in compared
        if item.explains and not item.same
    ]
    unknown = "nothing that was recorded differs: it is not the same twice here, or the environment steers its kernels"
    return found or [unknown]


def _code(then: Code, now: Code) -> Iterator[Compared]:
    yield Compared(what="code of the training", then=then.digest, now=now.digest)
    yield Compared(what="commit", then=_commit(then), now=_commit(now), explains=False)


def _commit(code: Code) -> str:
    return f"{code.commit or f'package {code.version}'}{' with changes' if code.dirty else ''}"


def _machine(then: Machine, now: Machine) -> Iterator[Compared]:
    for name in ("processor", "platform", "device", "precision", "threads", "python"):
        yield Compared(what=name, then=str(getattr(then, name)), now=str(getattr(now, name)), explains=name != "python")
    for name in _SHAPING:
        if name in then.packages or name in now.packages:
            yield Compared(what=name, then=then.packages.get(name, _NONE), now=now.packages.get(name, _NONE))
    names = sorted((then.packages.keys() | now.packages.keys()) - set(_SHAPING))
    moved = [
        f"{name} {then.packages.get(name, _NONE)} -> {now.packages.get(name, _NONE)}"
        for name in names
        if then.packages.get(name) != now.packages.get(name)
    ]
    more = f" and {len(moved) - _LISTED} more" if len(moved) > _LISTED else ""
    changed = f"{len(moved)} differ: {', '.join(moved[:_LISTED])}{more}"
    recorded = f"{len(names)} versions"
    yield Compared(what="other packages", then=recorded, now=changed if moved else recorded, explains=False)
