"""Make a registered version again from its lineage: how near the new adapter is, and what is not as it was."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from data_contracts.data_reports import DatasetManifest, FileRef
from data_contracts.errors import ConfigError, Problem, StoreError
from data_contracts.jobs.reproduction import AdaptersReport, CompareAdaptersJob
from data_contracts.lineage import EVIDENCE, Code, Compared, Lineage, Machine, Reproduction, result_of
from data_contracts.reports import AdapterRef, BaseModelRef, EvalTarget, TrainReport
from data_contracts.run_spec import RunSpec
from data_contracts.stage_inputs import EvaluationInputs, StartInputs, TrainInputs
from data_contracts.train_spec import TrainSpec
from tasks.evaluation.evaluate import evaluate_targets
from tasks.models.base import init_adapter, prepare_base, start_settings
from tasks.models.core.adapter_files import WEIGHTS
from tasks.release import registry
from tasks.release.lineage import code_now, machine_now
from tasks.release.registry import Registered
from tasks.reproduction.dataset import RebuiltSplits
from tasks.runtime.core.files import exclusive
from tasks.runtime.processes import Launch, run_worker
from tasks.runtime.store import Store, digest
from tasks.training.train import train_arm
from tasks.training.warm_start import choose_start, origin_at

_SHAPING = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "tokenizers", "safetensors", "numpy")
_NONE = "none"
_SHOWN, _LISTED = 12, 5


class AdapterDistance(NamedTuple):
    """How far the new adapter is from the recorded one. None: they are the same to the byte, or have no loss."""

    distance: float | None = None
    loss_then_nats: float | None = None
    loss_now_nats: float | None = None


class StartAgain(NamedTuple):
    """What training starts from this time. adapter: None is the base itself."""

    adapter: AdapterRef | None
    rows: FileRef
    compared: list[Compared]


class Rebuilt(NamedTuple):
    """What a version was made from, made again."""

    base: BaseModelRef
    rows: RebuiltSplits
    start: StartAgain


class Retrained(NamedTuple):
    """What training gave this time. kept: where its adapter is stored, relative to the store."""

    arm: TrainReport
    distance: AdapterDistance
    kept: str


@contextmanager
def working_place(store: Store, version: Registered) -> Iterator[Store]:
    """An empty store inside the store: nothing that an earlier run left is used, and no ledger records anything."""
    root = store.files / "reproductions" / f"{version.name}-{version.version}"
    root.parent.mkdir(parents=True, exist_ok=True)
    busy = StoreError(Problem(f"{version.label} is being made again already", str(root), act="wait for it"))
    with exclusive(Path(f"{root}.lock"), busy):
        shutil.rmtree(root, ignore_errors=True)
        yield Store(root)


def recorded_dataset(version: Registered) -> DatasetManifest:
    """The data set in the version's evidence."""
    return DatasetManifest.model_validate_json((version.artifacts / EVIDENCE / "dataset.json").read_bytes())


def recorded_adapter(version: Registered, then: Lineage) -> AdapterRef:
    """The registered adapter. Raises StoreError if it is not the file that the lineage names."""
    weights = Path(version.adapter.folder) / WEIGHTS
    found = digest(weights if weights.exists() else weights.parent)
    if found != then.training.adapter.sha256:
        what = f"the adapter of {version.label} is not the one that was registered ({found[:_SHOWN]})"
        act = "restore the registry's artifacts from a backup"
        raise StoreError(Problem(what, WEIGHTS, f"sha256 {then.training.adapter.sha256[:_SHOWN]}", act))
    return AdapterRef(folder=version.adapter.folder, sha256=found)


def base_again(store: Store, place: Store, spec: RunSpec, then: Lineage) -> BaseModelRef:
    """The recorded base: the store's if its files are what they were, else fetched or converted again. Raises ConfigError if
    it is another one by now."""
    folder = store.files / then.base.path
    if folder.exists() and digest(folder) == then.base.digest:
        return then.base.model_copy(update={"path": str(folder.resolve())})
    made = prepare_base(place, spec.model.base, then.base.revision)
    if made.digest != then.base.digest:
        what = f"the base {then.base.name} has other files than then ({made.digest[:_SHOWN]})"
        act = "restore it, or give the original folder: --set model.base=PATH"
        raise ConfigError(Problem(what, "model.base", f"digest {then.base.digest[:_SHOWN]}", act))
    return made


def begin_again(spec: RunSpec, place: Store, base: BaseModelRef, then: Lineage, rows: RebuiltSplits) -> StartAgain:
    """A new step-0 adapter from the recorded seed; for a warm start the adapter that its training resumed from."""
    training, train = then.training, TrainSpec.model_validate(then.training.settings)
    settings = start_settings(training.method, training.seed, train, then.machine.precision)
    adapter = init_adapter(place, base, settings, force=True) if settings else None
    used = rows.train
    if training.start and training.start.version and adapter:
        parent = registry.resolve(spec.store, f"models:/{then.name}/{training.start.version}", "reproduce")
        held_out = [rows.validation, rows.test]
        inputs = StartInputs(origin=origin_at(parent), base=base, step0=adapter, train=rows.train, held_out=held_out)
        start = choose_start(place, inputs, train.replay_share)
        adapter, used = start.adapter or adapter, start.rows
    compared = [
        Compared(what="base", then=then.base.digest, now=base.digest),
        Compared(what="step-0 adapter", then=training.step0_sha256 or _NONE, now=adapter.sha256 if adapter else _NONE),
    ]
    if training.start:
        compared.append(Compared(what="rows of the warm start", then=training.start.rows.sha256, now=used.sha256))
    return StartAgain(adapter, used, compared)


def train_again(
    place: Store, base: BaseModelRef, start: StartAgain, rows: RebuiltSplits, then: Lineage, threads: int
) -> TrainReport:
    """The arm with its recorded settings, seed and precision, from the first step on."""
    training, machine = then.training, then.machine
    settings = TrainSpec.model_validate(training.settings | {"threads": threads})
    inputs = TrainInputs(
        method=training.method, seed=training.seed, base=base, step0=start.adapter, rows=start.rows,
        validation=rows.validation, settings=settings, precision=machine.precision,
    )  # fmt: skip
    return train_arm(place, then.key, inputs, Launch(f"train {training.name}", force=True))


def compare_again(
    spec: RunSpec, place: Store, rebuilt: Rebuilt, version: Registered, then: Lineage, arm: TrainReport
) -> AdapterDistance:
    """Compare the two adapters, and their losses on the held-out rows, both measured now."""
    if arm.adapter.sha256 == then.training.adapter.sha256:
        return AdapterDistance()
    job = CompareAdaptersJob(then=version.adapter.folder, now=str(place.path(arm.adapter.folder)))
    found = run_worker("tasks.reproduction.workers.compare_adapters", job, place.files / "compared")
    own = {"method": arm.method, "quantisation": arm.quantisation}
    adapters = {"then": recorded_adapter(version, then), "now": arm.adapter}
    targets = [EvalTarget(name=name, adapter=adapter, **own) for name, adapter in adapters.items()]
    only_loss = {"tasks": ["domain_nll"], "forms": [], "sample_questions": 0, "task_folder": None}
    inputs = EvaluationInputs(
        base=rebuilt.base, test=rebuilt.rows.test, spec=spec.evaluate.model_copy(update=only_loss), task_files=None,
        max_tokens=spec.train.max_tokens, precision=then.machine.precision, threads=arm.threads,
    )  # fmt: skip
    scores = evaluate_targets(place, inputs, targets, spec.gates.confidence)
    losses = {report.target: report.nll_nats for report in scores}
    return AdapterDistance(AdaptersReport.model_validate(found).distance, losses["then"], losses["now"])


def reproduction_report(
    uri: str, then: Lineage, rebuilt: Rebuilt, retrained: Retrained, train_code: str, seconds: float
) -> Reproduction:
    """Everything then and now, and why the adapters may differ if they do."""
    arm = retrained.arm
    code, machine = code_now(train_code), machine_now(arm)
    inputs = [*rebuilt.rows.compared, *rebuilt.start.compared]
    compared = [*inputs, *_code(then.code, code), *_machine(then.machine, machine)]
    result = result_of(*retrained.distance)
    return Reproduction(
        model=uri,
        result=result,
        compared=compared,
        data=rebuilt.rows.note,
        adapter_then=then.training.adapter.sha256,
        adapter_now=arm.adapter.sha256,
        **retrained.distance._asdict(),
        reasons=[] if result == "identical" else _reasons(compared),
        kept=None if result == "identical" else retrained.kept,
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
