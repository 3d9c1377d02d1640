"""Score models with lm-eval: `python -m tasks.evaluation.workers.evaluate_models spec.json out/`.

Each form of the base is loaded once (tasks/models/workers/forms.py). Writes for every target out/NAME/samples.jsonl (task,
metric, row_id, value, tokens), out/NAME/facts.jsonl (a line for each domain item) and out/NAME/result.json. Killed and
started again with the same out/, it does not score again what was finished.
"""

import gc
import json
import logging
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

from lm_eval.evaluator import evaluate

from data_contracts.jobs.evaluation import EvaluateJob, EvaluationReport, ScoredModel, TargetResult
from data_contracts.reports import SampleAnswer, TaskScore
from data_contracts.run_spec import DOMAIN_TASKS
from tasks.evaluation.workers.domain_tasks import TaskItem, build_items, facts
from tasks.evaluation.workers.lm_eval_tasks import all_tasks
from tasks.evaluation.workers.packed_lm import PackedLM
from tasks.models.core.packing import Way
from tasks.models.workers.chat_template import Chat, load_chat
from tasks.models.workers.forms import ModelForm, attach_adapter, detach_adapter, form_of, load_form, loading_note
from tasks.models.workers.generation import Written, likeliest, next_log_probabilities, write_batch
from tasks.models.workers.scoring import COMPARED, choose_way
from tasks.runtime.core.files import write_atomically
from tasks.runtime.workers.device import Device, choose_device, peak_bytes
from tasks.runtime.workers.harness import main, say


@dataclass(frozen=True)
class TestSet:
    """What every target answers."""

    __test__ = False  # its name looks like a test class to pytest

    job: EvaluateJob
    chat: Chat
    items: list[TaskItem]
    tasks: dict[str, Any]
    scored_in: str  # precision and device: the same for numbers that are compared


def evaluate_models(job: EvaluateJob, out: Path) -> dict[str, Any]:
    """Score every target that was not scored in the same way before: an EvaluationReport."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    device = choose_device(job.precision, job.threads)
    chat = load_chat(Path(job.base))
    with_choices = "domain_choice" in job.tasks
    items = build_items(Path(job.test), chat, job.max_items, job.max_tokens, with_choices=with_choices)
    own = f"{device.precision} on {device.device}"
    tests = TestSet(job, chat, items, all_tasks(job, items, chat), own)
    wanted = [target for target in job.targets if job.before.get(target.name) != own]
    results = {target.name: found for target in wanted if (found := finished(out / target.name, own))}
    waiting = [target for target in wanted if target.name not in results]
    for form, targets in groupby(sorted(waiting, key=form_of), key=form_of):
        results |= score_form(form, list(targets), tests, device, out)
        gc.collect()
    report = EvaluationReport(
        results={target.name: results[target.name] for target in wanted}, items=len(items),
        overlap_accuracy=overlap_accuracy(items), peak_bytes=peak_bytes(device),
    )  # fmt: skip
    return report.model_dump(mode="json")


def finished(folder: Path, scored_in: str) -> TargetResult | None:
    """What an earlier start has left of a target, if it is complete and scored in the same precision and device."""
    file = folder / "result.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    return TargetResult.model_validate(found) if found.get("scored_in") == scored_in else None


def score_form(
    form: ModelForm, targets: list[ScoredModel], tests: TestSet, device: Device, out: Path
) -> dict[str, TargetResult]:
    """Results of the targets that share one form of the base."""
    say("note", text=loading_note(form, device))
    model = load_form(form, Path(tests.job.base), device)
    way = scoring_way(model, tests)
    return {target.name: score(target, model, way, tests, out / target.name) for target in targets}


def scoring_way(model: Any, tests: TestSet) -> Way:
    """How requests are scored. The model is left with an attention that it is sure to have, for writing too."""
    shortest = sorted(tests.items, key=lambda item: item["total_tokens"])[:COMPARED]
    sequences = [tests.chat.sequence(item["prompt"], item["completion"]) for item in shortest]
    return choose_way(model, sequences, tests.job.max_tokens).way


def score(target: ScoredModel, model: Any, way: Way, tests: TestSet, folder: Path) -> TargetResult:
    """Attach the target's adapter, run every task, answer the sample questions, take the adapter off again."""
    started = time.monotonic()
    tuned = attach_adapter(model, target)
    if target.method == "prefix":  # it cannot be packed, see choose_way
        way = "padded"
    scores, samples = run_tasks(tuned, way, target.name, tests)
    asked = pick_samples(tests.items, tests.job.sample_questions)
    answers = [answer(tuned, tests.chat, item, tests.job.sample_tokens) for item in asked]
    samples_next = [next_tokens(tuned, tests.chat, item) for item in asked]
    detach_adapter(tuned, target)
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "samples.jsonl", samples)
    write_lines(folder / "facts.jsonl", facts(tests.items))
    result = TargetResult(
        scores=scores,
        scored_in=tests.scored_in,
        answers=[
            SampleAnswer(question=item["question"], reference=reference, answer=written.text, **after)
            for item, (reference, written), after in zip(asked, answers, samples_next, strict=True)
        ],
        ms_per_token=statistics.median(written.ms_per_token for _, written in answers) if answers else None,
        seconds=time.monotonic() - started,
    )
    write_atomically(folder / "result.json", result.model_dump_json(indent=1))
    return result


Lines = list[dict[str, Any]]


def run_tasks(model: Any, way: Way, name: str, tests: TestSet) -> tuple[list[TaskScore], Lines]:
    """(score of each metric, a line for each item and metric) of every task."""
    lm = PackedLM(model, tests.chat, tests.job.batch_tokens, tests.job.max_tokens, name, way)
    for task in tests.tasks.values():
        task._instances = None  # built again for each model: they keep the last model's answers
    limits = {name: None if name in DOMAIN_TASKS else tests.job.task_limit for name in tests.tasks}
    scores: list[TaskScore] = []
    samples: Lines = []
    for limit in set(limits.values()):
        chosen = {name: task for name, task in tests.tasks.items() if limits[name] == limit}
        found: Any = evaluate(lm, {"tasks": chosen}, limit=limit, bootstrap_iters=0, log_samples=True)
        scores += read_scores(found["results"], found["n-samples"])
        samples += [line for name in chosen for line in sample_lines(name, found["samples"][name])]
    return scores, samples


def read_scores(results: dict[str, Any], counts: dict[str, Any]) -> list[TaskScore]:
    """Flatten lm-eval's `metric,filter` keys."""
    return [
        TaskScore(task=task, metric=key.split(",")[0], value=value, items=counts[task]["effective"])
        for task, metrics in results.items()
        for key, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "stderr" not in key and "," in key
    ]


def sample_lines(task: str, samples: list[dict[str, Any]]) -> Lines:
    """One line per item and metric: the paired statistics are computed from these."""
    return [
        {"task": task, "metric": metric, "row_id": sample["doc"].get("row_id", sample["doc_hash"]),
         "value": sample[metric], "tokens": sample["doc"].get("tokens")}
        for sample in samples
        for metric in sample["metrics"]
        if isinstance(sample[metric], int | float)
    ]  # fmt: skip


def write_lines(file: Path, lines: Iterable[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def pick_samples(items: list[TaskItem], count: int) -> list[TaskItem]:
    """The first items of every source in turn, so that each kind of row is seen."""
    by_source: dict[str, list[TaskItem]] = {}
    for item in items:
        by_source.setdefault(item["source"], []).append(item)
    rounds = zip_longest(*(by_source[source] for source in sorted(by_source)))
    return [item for each in rounds for item in each if item is not None][:count]


def answer(model: Any, chat: Chat, item: TaskItem, most_tokens: int) -> tuple[str, Written]:
    """The true answer to an item's question, and the model's."""
    (written,) = write_batch(model, chat, [chat.encode(item["prompt"])], most_tokens)
    return chat.read(chat.encode(item["completion"])), written


def next_tokens(model: Any, chat: Chat, item: TaskItem) -> dict[str, Any]:
    """The prompt and what may follow it: shows whether a loaded version is this very model."""
    nats_V = next_log_probabilities(model, chat.encode(item["prompt"]), chat.stop_ids[0])
    return {"prompt": item["prompt"], "next_tokens": likeliest(nats_V)}


def overlap_accuracy(items: list[TaskItem]) -> float | None:
    """How often word overlap alone picks the true answer: the bar a model must clear to have understood anything."""
    with_choices = [item for item in items if item["choices"]]
    if not with_choices:
        return None
    right = sum(bool(item["overlap_guess"] == item["label"]) for item in with_choices)
    return right / len(with_choices)


if __name__ == "__main__":
    main(evaluate_models, EvaluateJob)
