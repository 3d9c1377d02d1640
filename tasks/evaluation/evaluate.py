"""Score base, arms and champion on the frozen test items; what has been scored before is not scored again."""

import hashlib
import json
import math
import shutil
import uuid
from pathlib import Path
from typing import Any

from data_contracts.data_reports import FileRef
from data_contracts.errors import ConfigError, Problem
from data_contracts.reports import BaseModelRef, EvalReport, EvalTarget, SampleAnswer, TaskScore
from data_contracts.run_spec import EvaluateSpec
from data_contracts.verdict import Served
from tasks.evaluation.core.samples import clusters_of, read_facts, read_samples
from tasks.evaluation.core.stats import proportion
from tasks.models.integrity import checked_adapter, checked_base
from tasks.runtime.fingerprint import code_digest
from tasks.runtime.processes import Launch, run_worker
from tasks.runtime.store import Store, content_key, digest

_FILES = ("samples.jsonl", "facts.jsonl")


def evaluate_targets(
    store: Store,
    base: BaseModelRef,
    test: FileRef,
    targets: list[EvalTarget],
    evaluate: EvaluateSpec,
    task_files: FileRef | None,
    max_tokens: int,
    precision: str,
    confidence: float,
    threads: int | None,
    force: bool = False,
) -> list[EvalReport]:
    """One report for each target, all scored in the same precision on the same kind of device.

    A target's key holds its adapter, base, items and settings, but not its name. `precision` may be auto, so what was scored
    before, perhaps on another machine, is told to the worker: it scores anew what it would score otherwise.
    """
    own = task_files.sha256 if task_files else None
    settings = _settings(evaluate, max_tokens, precision) | {"task_folder": own}
    keys = {target.name: _key(target, base, test, settings) for target in targets}
    before = {name: None if force else _scored_in(store, key) for name, key in keys.items()}
    if None in before.values() or len(set(before.values())) > 1:
        place = {"threads": threads, "task_folder": evaluate.task_folder, "before": before}
        _score(store, base, test, targets, settings | place, keys, force)
    return [_report(store, target, test, keys[target.name], confidence) for target in targets]


def _scored_in(store: Store, key: str) -> str | None:
    """The precision and kind of device of an earlier result; None if there is none."""
    file = store.files / "evaluations" / key / "result.json"
    return str(json.loads(file.read_text())["scored_in"]) if file.exists() else None


def _settings(evaluate: EvaluateSpec, max_tokens: int, precision: str) -> dict[str, Any]:
    """What every target is scored by; `forms` only says which targets there are."""
    return evaluate.model_dump(exclude={"forms"}) | {"max_tokens": max_tokens, "precision": precision}


def _key(target: EvalTarget, base: BaseModelRef, test: FileRef, settings: dict[str, Any]) -> str:
    code = code_digest(("tasks.evaluation.workers.evaluate_models",))
    quantised = target.quantisation.model_dump_json() if target.quantisation else ""
    form = [target.method, quantised, str(target.merged), target.adapter.sha256 if target.adapter else ""]
    return content_key(*form, base.digest, test.sha256, code, json.dumps(settings, sort_keys=True))[:32]


def _score(
    store: Store,
    base: BaseModelRef,
    test: FileRef,
    targets: list[EvalTarget],
    settings: dict[str, Any],
    keys: dict[str, str],
    force: bool,
) -> None:
    run_key = hashlib.sha256(" ".join(sorted(keys[t.name] for t in targets)).encode()).hexdigest()[:16]
    out = store.files / "evaluations" / f"run-{run_key}"
    spec = settings | _inputs(store, base, test, targets)
    report = run_worker("tasks.evaluation.workers.evaluate_models", spec, out, Launch(force=force))
    for scored, found in report["results"].items():
        with store.publish("evaluations", keys[scored]) as folder:
            for name in _FILES:
                shutil.copy(out / scored / name, folder / name)
            result = found | {"overlap_accuracy": report["overlap_accuracy"]}
            (folder / "result.json").write_text(json.dumps(result, indent=1))
    shutil.rmtree(out)


def _inputs(store: Store, base: BaseModelRef, test: FileRef, targets: list[EvalTarget]) -> dict[str, Any]:
    return {
        "base": str(checked_base(store, base)),
        "test": str(store.path(test)),
        "targets": [t.model_dump(exclude={"adapter"}) | {"adapter": _folder(store, t)} for t in targets],
    }


def _folder(store: Store, target: EvalTarget) -> str | None:
    return str(checked_adapter(store, target.adapter)) if target.adapter else None


def _report(store: Store, target: EvalTarget, test: FileRef, key: str, confidence: float) -> EvalReport:
    folder = store.path(f"evaluations/{key}")
    result = json.loads((folder / "result.json").read_text())
    found = read_samples((folder / "samples.jsonl").read_text(encoding="utf-8").splitlines())
    facts = read_facts((folder / "facts.jsonl").read_text(encoding="utf-8").splitlines())
    losses, choices = found.get("domain_nll.nll_nats"), found.get("domain_choice.accuracy")
    nats = float(losses.values_I.sum()) if losses else 0.0
    right = choices and proportion(choices.values_I, confidence, clusters_of(choices.row_ids, facts))
    return EvalReport(
        target=target.name,
        adapter_sha256=target.adapter.sha256 if target.adapter else None,
        items_sha256=test.sha256,
        nll_nats=nats / float(losses.tokens_I.sum()) if losses else None,
        bits_per_byte=nats / math.log(2) / sum(facts[row].bytes for row in losses.row_ids) if losses else None,
        accuracy=right.value if right else None,
        accuracy_interval=right.interval if right else None,
        lexical_baseline_accuracy=result["overlap_accuracy"],
        items=len(facts),
        scores=[TaskScore(**score) for score in result["scores"]],
        samples=store.ref(folder / "samples.jsonl"),
        facts=store.ref(folder / "facts.jsonl"),
        answers=[SampleAnswer(**answer) for answer in result["answers"]],
        ms_per_token=result["ms_per_token"],
        seconds=result["seconds"],
        precision=result["scored_in"].partition(" ")[0],
    )


def serve_alone(
    store: Store,
    base: BaseModelRef,
    test: FileRef,
    target: EvalTarget,
    evaluate: EvaluateSpec,
    max_tokens: int,
    precision: str,
    threads: int | None,
) -> Served:
    """Time and memory of one model in a fresh process that loads it and answers the sample questions, nothing else."""
    alone: dict[str, Any] = {"tasks": [], "task_folder": None, "threads": threads}
    spec = _settings(evaluate, max_tokens, precision) | alone | _inputs(store, base, test, [target])
    out = store.files / "evaluations" / f"alone-{uuid.uuid4().hex}"
    try:
        report = run_worker("tasks.evaluation.workers.evaluate_models", spec, out, Launch(f"serve {target.name} alone"))
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return Served(ms_per_token=report["results"][target.name]["ms_per_token"], peak_bytes=report["peak_bytes"])


def check_tasks(store: Store, base: BaseModelRef, test: FileRef, evaluate: EvaluateSpec, max_tokens: int) -> list[str]:
    """Find the lm-eval tasks and their data now, not after hours of training. Raises ConfigError for what is missing."""
    spec = _settings(evaluate, max_tokens, "auto") | {"threads": 1} | _inputs(store, base, test, [])
    out = store.files / "evaluations" / f"check-{uuid.uuid4().hex}"
    run_worker("tasks.evaluation.workers.evaluate_models", spec, out, Launch("check tasks"))
    shutil.rmtree(out)
    return evaluate.tasks


def task_files(evaluate: EvaluateSpec) -> FileRef | None:
    """The user's own lm-eval tasks by content. Raises ConfigError if the folder is not there."""
    if evaluate.task_folder is None:
        return None
    folder = Path(evaluate.task_folder)
    if not any(folder.rglob("*.yaml")):
        what = f"no task file in {evaluate.task_folder}"
        raise ConfigError(Problem(what, "evaluate.task_folder", "a folder with .yaml files", "correct the path"))
    return FileRef(path=str(folder), sha256=digest(folder))


def benchmark_items(store: Store, tasks: list[str], task_files: FileRef | None) -> FileRef:
    """The texts of every item of some lm-eval tasks, as JSONL. Raises ConfigError for a task that cannot be had."""
    out = store.files / "benchmarks" / f"work-{uuid.uuid4().hex}"
    spec = {"tasks": tasks, "task_folder": task_files.path if task_files else None}
    try:
        run_worker("tasks.evaluation.workers.benchmark_items", spec, out, Launch("benchmark items"))
        key = content_key(digest(out / "items.jsonl"))[:32]
        with store.publish("benchmarks", key) as folder:
            (out / "items.jsonl").rename(folder / "items.jsonl")
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return store.ref(store.files / "benchmarks" / key / "items.jsonl")
