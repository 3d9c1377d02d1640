"""Score models with lm-eval: `python -m tasks.evaluation.workers.evaluate_models spec.json out/`.

spec: base, test, targets [{name, method, adapter or null, quantisation or null, merged}], precision, threads, max_tokens
and the settings of data_contracts.run_spec.EvaluateSpec; without tasks the targets only answer the sample questions. before: in
what precision and on what device a target has been scored, by name; those that would be scored alike are left out. Each form
of the base is loaded once (tasks/models/workers/forms.py). Writes out/NAME/samples.jsonl (task, metric, row_id, value, tokens),
out/NAME/facts.jsonl (a line for each domain item) and out/NAME/result.json for every target; killed and started again with
the same out/, it does not score again what was finished.
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

from data_contracts.run_spec import DOMAIN_TASKS
from tasks.evaluation.workers.domain_tasks import Item, build_items, facts
from tasks.evaluation.workers.lm_eval_tasks import all_tasks
from tasks.evaluation.workers.packed_lm import PackedLM
from tasks.models.core.packing import Way
from tasks.models.workers.chat_template import Chat, load_chat
from tasks.models.workers.forms import (
    ModelForm,
    Target,
    attach_adapter,
    detach_adapter,
    form_of,
    load_form,
    loading_note,
)
from tasks.models.workers.generation import Written, likeliest, next_log_probabilities, write_batch
from tasks.models.workers.scoring import COMPARED, choose_way
from tasks.runtime.core.files import write_atomically
from tasks.runtime.workers.device import Device, choose_device, peak_bytes
from tasks.runtime.workers.harness import main, say


@dataclass(frozen=True)
class Exam:
    """What every target is asked."""

    chat: Chat
    items: list[Item]
    tasks: dict[str, Any]
    spec: dict[str, Any]
    scored_in: str  # what must be the same for numbers that are compared


def evaluate_models(spec: dict[str, Any], out: Path) -> dict[str, Any]:
    """results by target that was scored, items, overlap_accuracy, and peak_bytes of this process."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    device = choose_device(spec["precision"], spec["threads"])
    chat = load_chat(Path(spec["base"]))
    with_choices = "domain_choice" in spec["tasks"]
    items = build_items(Path(spec["test"]), chat, spec["max_items"], spec["max_tokens"], with_choices)
    own = f"{device.precision} on {device.device}"
    exam = Exam(chat, items, all_tasks(spec, items, chat), spec, own)
    wanted = [target for target in spec["targets"] if spec.get("before", {}).get(target["name"]) != own]
    results = {target["name"]: finished(out / target["name"], own) for target in wanted}
    waiting = [target for target in wanted if results[target["name"]] is None]
    for form, targets in groupby(sorted(waiting, key=form_of), key=form_of):
        results |= score_form(form, list(targets), exam, device, out)
        gc.collect()
    summary = {"items": len(items), "overlap_accuracy": overlap_accuracy(items), "peak_bytes": peak_bytes(device)}
    return {"results": results, **summary}


def finished(folder: Path, scored_in: str) -> dict[str, Any] | None:
    """What an earlier start has left of a target, if it was complete and scored alike."""
    file = folder / "result.json"
    found = dict(json.loads(file.read_text())) if file.exists() else {}
    return found if found.get("scored_in") == scored_in else None


def score_form(form: ModelForm, targets: list[Target], exam: Exam, device: Device, out: Path) -> dict[str, Any]:
    """Results of the targets that stand on one form of the base."""
    say("note", text=loading_note(form, device))
    model = load_form(form, Path(exam.spec["base"]), device)
    way = fastest_way(model, exam)
    return {target["name"]: score(target, model, way, exam, out / target["name"]) for target in targets}


def fastest_way(model: Any, exam: Exam) -> Way:
    """How requests are scored; the model is left with an attention that it is sure to have, for writing too."""
    shortest = sorted(exam.items, key=lambda item: item["total_tokens"])[:COMPARED]
    sequences = [exam.chat.sequence(item["prompt"], item["completion"]) for item in shortest]
    return choose_way(model, sequences, exam.spec["max_tokens"]).way


def score(target: Target, model: Any, way: Way, exam: Exam, folder: Path) -> dict[str, Any]:
    """Attach the target's adapter, run every task, answer the sample questions, take the adapter off again."""
    started = time.monotonic()
    tuned = attach_adapter(model, target)
    if target["method"] == "prefix":  # it cannot be packed, see choose_way
        way = "padded"
    scores, samples = run_tasks(tuned, way, target["name"], exam)
    asked = pick_samples(exam.items, exam.spec["sample_questions"])
    answers = [answer(tuned, exam.chat, item, exam.spec["sample_tokens"]) for item in asked]
    samples_next = [next_tokens(tuned, exam.chat, item) for item in asked]
    detach_adapter(tuned, target)
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "samples.jsonl", samples)
    write_lines(folder / "facts.jsonl", facts(exam.items))
    result = {
        "scores": scores,
        "scored_in": exam.scored_in,
        "answers": [
            {"question": item["question"], "reference": reference, "answer": written.text, **after}
            for item, (reference, written), after in zip(asked, answers, samples_next, strict=True)
        ],
        "ms_per_token": statistics.median(written.ms_per_token for _, written in answers) if answers else None,
        "seconds": time.monotonic() - started,
    }
    write_atomically(folder / "result.json", json.dumps(result, indent=1))
    return result


Lines = list[dict[str, Any]]


def run_tasks(model: Any, way: Way, name: str, exam: Exam) -> tuple[Lines, Lines]:
    """(score of each metric, a line for each item and metric) of every task."""
    lm = PackedLM(model, exam.chat, exam.spec["batch_tokens"], exam.spec["max_tokens"], name, way)
    for task in exam.tasks.values():
        task._instances = None  # built anew for each model: they keep the last model's answers
    limits = {name: None if name in DOMAIN_TASKS else exam.spec["task_limit"] for name in exam.tasks}
    scores: Lines = []
    samples: Lines = []
    for limit in set(limits.values()):
        chosen = {name: task for name, task in exam.tasks.items() if limits[name] == limit}
        found: Any = evaluate(lm, {"tasks": chosen}, limit=limit, bootstrap_iters=0, log_samples=True)
        scores += read_scores(found["results"], found["n-samples"])
        samples += [line for name in chosen for line in read_samples(name, found["samples"][name])]
    return scores, samples


def read_scores(results: dict[str, Any], counts: dict[str, Any]) -> Lines:
    """Flatten lm-eval's `metric,filter` keys."""
    return [
        {"task": task, "metric": key.split(",")[0], "value": value, "items": counts[task]["effective"]}
        for task, metrics in results.items()
        for key, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "stderr" not in key and "," in key
    ]


def read_samples(task: str, samples: list[dict[str, Any]]) -> Lines:
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


def pick_samples(items: list[Item], count: int) -> list[Item]:
    """The first items of every source in turn, so that each kind of row is seen."""
    by_source: dict[str, list[Item]] = {}
    for item in items:
        by_source.setdefault(item["source"], []).append(item)
    turns = zip_longest(*(by_source[source] for source in sorted(by_source)))
    return [item for turn in turns for item in turn if item is not None][:count]


def answer(model: Any, chat: Chat, item: Item, most_tokens: int) -> tuple[str, Written]:
    """The true answer to an item's question, and the model's."""
    (written,) = write_batch(model, chat, [chat.encode(item["prompt"])], most_tokens)
    return chat.read(chat.encode(item["completion"])), written


def next_tokens(model: Any, chat: Chat, item: Item) -> dict[str, Any]:
    """The prompt and what may follow it: who loads the registered version can tell whether it is this very model."""
    nats_V = next_log_probabilities(model, chat.encode(item["prompt"]), chat.stop_ids[0])
    return {"prompt": item["prompt"], "next_tokens": likeliest(nats_V)}


def overlap_accuracy(items: list[Item]) -> float | None:
    """How often word overlap alone picks the true answer: the bar a model must clear to have understood anything."""
    with_choices = [item for item in items if item["choices"]]
    if not with_choices:
        return None
    right = sum(bool(item["overlap_guess"] == item["label"]) for item in with_choices)
    return right / len(with_choices)


if __name__ == "__main__":
    main(evaluate_models)
