"""Score models with lm-eval: `python -m tasks.workers.evaluate_models spec.json out/`.

spec: base, test, targets [{name, method, adapter or null, quantisation or null}] and the dials of
data_contracts.run_spec.EvaluateSpec. Each form of the base is loaded once: in full precision for the base itself, LoRA
adapters and prefixes, in 4 bits as they were trained for QLoRA adapters; fully tuned weights are loaded instead. Writes
out/NAME/samples.jsonl (task, row_id, value, tokens) and out/NAME/result.json for every target; killed and started again
with the same out/, it does not score again what was finished.
"""

import gc
import json
import logging
import time
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

import torch
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from peft import PeftModel

from data_contracts.errors import ConfigError, Problem
from data_contracts.method_rules import LORA_ARMS
from tasks.workers.bases import load_base
from tasks.workers.chat import Chat, load_chat
from tasks.workers.device import Device, choose_device
from tasks.workers.domain_tasks import DOMAIN_TASKS, Item, build_items, domain_choice, domain_nll
from tasks.workers.harness import main, say, write_json
from tasks.workers.packed_lm import PackedLM
from tasks.workers.scoring import COMPARED, Way, choose_way

Target = dict[str, Any]


def evaluate_models(spec: dict[str, Any], out: Path) -> dict[str, Any]:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    device = choose_device(spec["precision"], spec["threads"])
    chat = load_chat(Path(spec["base"]))
    items = build_items(Path(spec["test"]), chat, spec["max_items"], spec["max_tokens"])
    tasks = load_tasks(spec["tasks"], items, spec["task_folder"])
    results = {target["name"]: finished(out / target["name"]) for target in spec["targets"]}
    waiting = [target for target in spec["targets"] if results[target["name"]] is None]
    for form, targets in groupby(sorted(waiting, key=form_of), key=form_of):
        for name, result in score_form(form, list(targets), chat, tasks, items, device, spec, out).items():
            results[name] = result
        gc.collect()
    return {"results": results, "items": len(items), "overlap_accuracy": overlap_accuracy(items)}


Form = tuple[str, str, str, bool]


def form_of(target: Target) -> Form:
    """What is loaded for a target: folder of own weights or empty for the base, method, and how it is quantised."""
    if target["method"] == "full" and target["adapter"]:
        return (target["adapter"], "full", "", False)
    quantised = target["quantisation"]
    return ("", "qlora", quantised["quant_type"], quantised["double_quant"]) if quantised else ("", "lora", "", False)


def score_form(
    form: Form, targets: list[Target], chat: Chat, tasks: dict[str, Any], items: list[Item], device: Device,
    spec: dict[str, Any], out: Path,
) -> dict[str, Any]:  # fmt: skip
    """Results of the targets that stand on one form of the base."""
    own, method, quant_type, double_quant = form
    say("note", text=f"loading {'tuned weights' if own else 'the base'} ({quant_type.upper() or device.precision})")
    quantisation = {"quant_type": quant_type, "double_quant": double_quant}
    model: Any = load_base(Path(own or spec["base"]), method, device, quantisation)
    shortest = sorted(items, key=lambda item: item["total_tokens"])[:COMPARED]
    sequences = [chat.sequence(item["prompt"], item["completion"]) for item in shortest]
    way = choose_way(model, sequences, spec["max_tokens"]).way
    return {target["name"]: score(target, model, way, chat, tasks, items, spec, out) for target in targets}


def attach(model: Any, target: Target) -> Any:
    """The model with the target's adapter on it; itself where there is none."""
    has_adapter = target["adapter"] and target["method"] != "full"
    return PeftModel.from_pretrained(model, target["adapter"]).eval() if has_adapter else model


def score(
    target: Target, model: Any, way: Way, chat: Chat, tasks: dict[str, Any], items: list[Item], spec: dict[str, Any],
    out: Path,
) -> dict[str, Any]:  # fmt: skip
    """Attach the target's adapter, run every task, answer the sample questions, take the adapter off again."""
    started = time.monotonic()
    tuned = attach(model, target)
    if target["method"] == "prefix":  # it cannot be packed, see choose_way
        way = "padded"
    lm = PackedLM(tuned, chat, spec["batch_tokens"], spec["max_tokens"], target["name"], way)
    for task in tasks.values():
        task._instances = None  # built anew for each model: they keep the last model's answers
    limits = {name: None if name in DOMAIN_TASKS else spec["task_limit"] for name in tasks}
    scores, samples = [], []
    for limit in set(limits.values()):
        chosen = {name: task for name, task in tasks.items() if limits[name] == limit}
        found: Any = evaluate(lm, {"tasks": chosen}, limit=limit, bootstrap_iters=0, log_samples=True)
        scores += read_scores(found["results"], found["n-samples"])
        samples += [line for name in chosen for line in read_samples(name, found["samples"][name])]
    folder = out / target["name"]
    folder.mkdir(exist_ok=True)
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    answers = [
        answer(tuned, chat, item, spec["sample_tokens"]) for item in pick_samples(items, spec["sample_questions"])
    ]
    if target["method"] in LORA_ARMS and target["adapter"]:
        tuned.unload()  # a prefix is no part of the model
    result = {"scores": scores, "answers": answers, "seconds": time.monotonic() - started}
    write_json(folder / "result.json", result)
    return result


def finished(folder: Path) -> dict[str, Any] | None:
    """What an earlier start has left of a target, if it was complete."""
    file = folder / "result.json"
    return dict(json.loads(file.read_text())) if file.exists() else None


def load_tasks(names: list[str], items: list[Item], folder: str | None) -> dict[str, Any]:
    """Our two tasks from the items, others by name from the user's folder or from lm-eval."""
    tasks: dict[str, Any] = {}
    if "domain_nll" in names:
        tasks["domain_nll"] = domain_nll(items)
    with_choices = [item for item in items if item["choices"]]
    if "domain_choice" in names and with_choices:
        tasks["domain_choice"] = domain_choice(with_choices)
    others = [name for name in names if name not in DOMAIN_TASKS]
    return tasks | (_fetch(_manager(others, folder), others) if others else {})


def _manager(names: list[str], folder: str | None) -> TaskManager:
    """lm-eval's own index takes seconds to build: only where the user's folder does not hold every task."""
    if folder:
        own = TaskManager(include_path=folder, include_defaults=False)
        if set(names) <= set(own.all_tasks):
            return own
    manager = TaskManager(include_path=folder)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ConfigError(*(Problem(f"lm-eval has no task {name!r}", "evaluate.tasks",
                                    act="list them with: lm-eval ls tasks") for name in unknown))  # fmt: skip
    return manager


def _fetch(manager: TaskManager, names: list[str]) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = manager.load(names)["tasks"]
    except (OSError, ConnectionError, ValueError) as error:
        raise ConfigError(Problem(f"the data of {', '.join(names)} cannot be had: {error}", "evaluate.tasks",
                                  act="go online once so that they are cached, or take the task out")) from error  # fmt: skip
    return loaded


def read_scores(results: dict[str, Any], counts: dict[str, Any]) -> list[dict[str, Any]]:
    """Flatten lm-eval's `metric,filter` keys."""
    return [
        {"task": task, "metric": key.split(",")[0], "value": value, "items": counts[task]["effective"]}
        for task, metrics in results.items()
        for key, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "stderr" not in key and "," in key
    ]


def read_samples(task: str, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per item and metric: the paired statistics are computed from these."""
    return [
        {"task": task, "metric": metric, "row_id": sample["doc"].get("row_id", sample["doc_hash"]),
         "value": sample[metric], "tokens": sample["doc"].get("tokens")}
        for sample in samples
        for metric in sample["metrics"]
        if isinstance(sample[metric], int | float)
    ]  # fmt: skip


def pick_samples(items: list[Item], count: int) -> list[Item]:
    """The first items of every source in turn, so that each kind of row is seen."""
    by_source: dict[str, list[Item]] = {}
    for item in items:
        by_source.setdefault(item["source"], []).append(item)
    turns = zip_longest(*(by_source[source] for source in sorted(by_source)))
    return [item for turn in turns for item in turn if item is not None][:count]


def overlap_accuracy(items: list[Item]) -> float | None:
    """How often word overlap alone picks the true answer: the bar a model must clear to have understood anything."""
    with_choices = [item for item in items if item["choices"]]
    if not with_choices:
        return None
    right = sum(bool(item["overlap_guess"] == item["label"]) for item in with_choices)
    return right / len(with_choices)


@torch.inference_mode()
def answer(model: Any, chat: Chat, item: Item, most_tokens: int) -> dict[str, str]:
    """The model's greedy answer to an item's question."""
    ids = torch.tensor([chat.encode(item["prompt"])], device=model.device)
    stops = chat.stop_ids
    written = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=most_tokens, do_sample=False,
        eos_token_id=stops, pad_token_id=stops[0], use_cache=True,
    )[0, ids.shape[1] :]  # fmt: skip
    text = chat.tokenizer.decode(written, skip_special_tokens=True)
    reference = str(chat.tokenizer.decode(chat.encode(item["completion"]), skip_special_tokens=True))
    return {"question": item["question"], "reference": reference.strip(), "answer": str(text).strip()}


if __name__ == "__main__":
    main(evaluate_models)
