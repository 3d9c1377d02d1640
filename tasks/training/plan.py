"""Plan a run's memory: the base's architecture from its configuration, then the formulas. No weights are read."""

import difflib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import data_contracts
from data_contracts.errors import ConfigError, Problem
from data_contracts.jobs.training import DescribeBaseJob
from data_contracts.run_spec import ModelSpec, RunSpec
from data_contracts.train_spec import Method, TrainSpec
from tasks.runtime.processes import Launch, run_worker
from tasks.training.core.architecture import Architecture, decoder
from tasks.training.core.fitting import CARDS_GB, Card, Change, card, changes, needed, usable_bytes
from tasks.training.core.memory import MemoryParts, predict
from tasks.training.core.memory_settings import Settings, StepShape, settings_of, unplanned

_SHAPES = Path(data_contracts.__file__).parent / "architectures.json"


@dataclass(frozen=True)
class Plan:
    """One method's memory, on all usual cards and on the one that was asked for."""

    settings: Settings
    parts: MemoryParts
    needed: int
    cards: tuple[Card, ...]
    gpu: Card | None
    changes: tuple[Change, ...]
    alternatives: dict[str, int]
    """What QLoRA would need more (bytes) in other forms."""

    @property
    def fits(self) -> bool:
        return self.gpu is None or self.gpu.fits


def find_architecture(model: ModelSpec) -> Architecture:
    """From the shapes that come with the package, else from the base's config.json. Raises ConfigError."""
    shapes = json.loads(_SHAPES.read_text(encoding="utf-8"))
    if model.base in shapes:
        return decoder(shapes[model.base])
    if not Path(model.base).is_dir() and (model.base.startswith((".", "/", "~")) or model.base.count("/") != 1):
        near = difflib.get_close_matches(model.base, shapes, n=1)
        act = f"did you mean {near[0]}?" if near else "give an existing folder, or a hub id such as ORG/NAME"
        raise ConfigError(
            Problem("no such base is known here, and no such folder", model.base, f"{', '.join(shapes)}", act)
        )
    with tempfile.TemporaryDirectory() as out:
        job = DescribeBaseJob(base=model.base, revision=model.revision)
        launch = Launch(f"reading {model.base}")
        return Architecture.from_report(run_worker("tasks.training.workers.describe_base", job, Path(out), launch))


def plan_methods(
    spec: RunSpec, methods: Sequence[Method], length: int | None, batch: int | None, gpu: float | None
) -> tuple[Architecture, list[Plan]]:
    """A plan for each method. length, batch: rows of one step; left out, they come from the spec's settings."""
    arch = find_architecture(spec.model)
    _check(spec.train, methods, arch)
    length = length or min(spec.train.max_tokens, spec.train.batch_tokens)
    batch = batch or max(1, spec.train.batch_tokens // length)
    compute_bytes = 4 if spec.model.precision == "fp32" else 2
    shape = StepShape(length, batch, way="padded" if arch.softcap else "packed")
    asked = [settings_of(spec.train, method, compute_bytes, shape) for method in methods]
    return arch, [_plan(arch, settings, gpu) for settings in asked]


def _plan(arch: Architecture, settings: Settings, gpu: float | None) -> Plan:
    asked = card(arch, settings, gpu) if gpu is not None else None
    return Plan(
        settings=settings,
        parts=predict(arch, settings),
        needed=needed(arch, settings),
        cards=tuple(card(arch, settings, gigabytes) for gigabytes in CARDS_GB),
        gpu=asked,
        changes=tuple(changes(arch, settings)) if asked and not asked.fits else (),
        alternatives=_alternatives(arch, settings),
    )


def _alternatives(arch: Architecture, settings: Settings) -> dict[str, int]:
    if not settings.is_quantised:
        return {}
    plain = {"without double quantisation": replace(settings, double_quant=False)} if settings.double_quant else {}
    other = plain | {
        "after PEFT's prepare_model_for_kbit_training": replace(
            settings, stack=replace(settings.stack, kbit_upcast=True)
        ),
    }
    static = predict(arch, settings).static
    return {name: predict(arch, changed).static - static for name, changed in other.items()}


def _check(train: TrainSpec, methods: Sequence[Method], arch: Architecture) -> None:
    found = (unplanned(train, method) for method in methods)
    problems = list({problem.what: problem for problem in found if problem}.values())
    names = [linear.name for linear in arch.linears]
    wanted = [train.target_modules] if isinstance(train.target_modules, str) else train.target_modules
    for name in wanted:
        if name != "all-linear" and name not in names:
            problems.append(
                Problem(f"{name} is no layer of this base", "train.target_modules", f"all-linear or {', '.join(names)}")
            )
    if problems:
        raise ConfigError(*problems)


def room_of(gigabytes: float) -> int:
    """Bytes that CUDA offers of a card."""
    return usable_bytes(gigabytes)
