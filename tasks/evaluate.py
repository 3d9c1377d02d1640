"""Score base, arms and champion on the frozen test items; what has been scored before is not scored again."""

import hashlib
import json
import shutil
import uuid
from pathlib import Path
from typing import Any

from data_contracts.data_reports import FileRef
from data_contracts.errors import ConfigError, Problem
from data_contracts.reports import BaseModelRef, EvalReport, EvalTarget, SampleAnswer, TaskScore
from data_contracts.run_spec import EvaluateSpec
from tasks.core.comparison import Samples, read_samples
from tasks.core.stats import per_token, proportion_interval
from tasks.drafts import content_key
from tasks.fingerprint import code_digest
from tasks.processes import run_worker
from tasks.stores import Store, digest


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
    afresh: bool = False,
) -> list[EvalReport]:
    """One report for each target. A target's key holds its adapter, base, items and dials, but not its name."""
    own = task_files.sha256 if task_files else None
    dials = evaluate.model_dump() | {"max_tokens": max_tokens, "precision": precision, "task_folder": own}
    keys = {target.name: _key(target, base, test, dials) for target in targets}
    missing = [
        t for t in targets if afresh or not (store.files / "evaluations" / keys[t.name] / "result.json").exists()
    ]
    if missing:
        place = {"threads": threads, "task_folder": evaluate.task_folder}
        _score(store, base, test, missing, dials | place, keys, afresh)
    return [_report(store, target, test, keys[target.name], confidence) for target in targets]


def _key(target: EvalTarget, base: BaseModelRef, test: FileRef, dials: dict[str, Any]) -> str:
    code = code_digest(("tasks.workers.evaluate_models",))
    quantised = target.quantisation.model_dump_json() if target.quantisation else ""
    what = [target.method, quantised, target.adapter.sha256 if target.adapter else "", base.digest, test.sha256, code]
    return content_key(*what, json.dumps(dials, sort_keys=True))[:32]


def _score(
    store: Store,
    base: BaseModelRef,
    test: FileRef,
    targets: list[EvalTarget],
    dials: dict[str, Any],
    keys: dict[str, str],
    afresh: bool,
) -> None:
    run_key = hashlib.sha256(" ".join(sorted(keys[t.name] for t in targets)).encode()).hexdigest()[:16]
    out = store.files / "evaluations" / f"run-{run_key}"
    spec = dials | {
        "base": str(store.path(base.path)),
        "test": str(store.path(test)),
        "targets": [t.model_dump(exclude={"adapter"}) | {"adapter": _folder(store, t)} for t in targets],
    }
    report = run_worker("tasks.workers.evaluate_models", spec, out, afresh=afresh)
    for target in targets:
        with store.publish("evaluations", keys[target.name]) as folder:
            shutil.copy(out / target.name / "samples.jsonl", folder / "samples.jsonl")
            result = report["results"][target.name] | {"overlap_accuracy": report["overlap_accuracy"]}
            (folder / "result.json").write_text(json.dumps(result, indent=1))
    shutil.rmtree(out)


def _folder(store: Store, target: EvalTarget) -> str | None:
    if target.adapter is None:
        return None
    folder = target.adapter.folder
    return folder if Path(folder).is_absolute() else str(store.path(folder))


def _report(store: Store, target: EvalTarget, test: FileRef, key: str, confidence: float) -> EvalReport:
    folder = store.path(f"evaluations/{key}")
    result = json.loads((folder / "result.json").read_text())
    found = read_samples((folder / "samples.jsonl").read_text().splitlines())
    nll, choice = found.get("domain_nll"), found.get("domain_choice")
    nll_nats = per_token(nll.values_I, nll.tokens_I) if nll else None
    return EvalReport(
        target=target.name,
        adapter_sha256=target.adapter.sha256 if target.adapter else None,
        items_sha256=test.sha256,
        nll_nats=nll_nats,
        accuracy=float(choice.values_I.mean()) if choice else None,
        accuracy_interval=_proportion(choice, confidence) if choice else None,
        lexical_baseline_accuracy=result["overlap_accuracy"],
        items=max(len(samples.row_ids) for samples in found.values()),
        scores=[TaskScore(**score) for score in result["scores"]],
        samples=store.ref(folder / "samples.jsonl"),
        answers=[SampleAnswer(**answer) for answer in result["answers"]],
        seconds=result["seconds"],
    )


def _proportion(choice: Samples, confidence: float) -> tuple[float, float]:
    return proportion_interval(int(choice.values_I.sum()), len(choice.row_ids), confidence)


def check_tasks(store: Store, base: BaseModelRef, test: FileRef, evaluate: EvaluateSpec, max_tokens: int) -> list[str]:
    """Find the lm-eval tasks and their data now, not after hours of training. Raises ConfigError for what is missing."""
    dials = evaluate.model_dump() | {"max_tokens": max_tokens, "precision": "auto", "threads": 1, "targets": []}
    spec = dials | {"base": str(store.path(base.path)), "test": str(store.path(test))}
    out = store.files / "evaluations" / f"check-{uuid.uuid4().hex}"
    run_worker("tasks.workers.evaluate_models", spec, out, "check tasks")
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
        run_worker("tasks.workers.benchmark_items", spec, out, "benchmark items")
        key = content_key(digest(out / "items.jsonl"))[:32]
        with store.publish("benchmarks", key) as folder:
            (out / "items.jsonl").rename(folder / "items.jsonl")
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return store.ref(store.files / "benchmarks" / key / "items.jsonl")
