"""Packed prefix trees against what one would use instead: a padded Trainer step, and lm-eval's HFLM.

Same model, rows, adapter, precision and threads, in one process; the two ways alternate, and the ratio is taken pair by
pair. Losses and log-probabilities are compared too: a faster wrong answer is no gain.

    python benchmarks/packing.py [--pairs 5] [--threads 2]
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import PeftModel

from data_contracts.jobs.data import PythonDocsJob
from data_contracts.jobs.models import InitAdapterJob, PrepareBaseJob
from data_contracts.train_spec import TrainSpec
from tasks.evaluation.core.items import TestQuestion, choose_distractors
from tasks.evaluation.workers.packed_lm import PackedLM
from tasks.models.base import start_settings
from tasks.models.core.packing import ScoredSequence
from tasks.models.workers.chat_template import Chat, load_chat
from tasks.models.workers.loading import load_base
from tasks.models.workers.prepare_base import prepare
from tasks.models.workers.scoring import scored_losses, to_tensors
from tasks.runtime.processes import run_worker
from tasks.runtime.workers.device import Device, choose_device

BATCH_ROWS, EVAL_ITEMS, HFLM_BATCH = 8, 16, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), arguments.pairs, choose_device(threads=arguments.threads))


def run(folder: Path, pairs: int, device: Device) -> None:
    base = Path(prepare(PrepareBaseJob(base="builtin:smollm2-135m", revision=None), folder / "base")["path"])
    rows = documentation_rows(folder / "docs")
    start = start_settings("lora", 17, TrainSpec(rank=16, alpha=32), device.precision)
    assert start
    run_worker("tasks.models.workers.init_adapter", InitAdapterJob(base=base, settings=start), folder / "step0")
    chat = load_chat(base)
    for method in ("lora", "qlora"):
        model = load_base(base, method, device)
        tuned = PeftModel.from_pretrained(model, folder / "step0" / "adapter", is_trainable=True)
        compare_training(method, tuned, chat, rows, pairs)
        tuned.unload()
    compare_scoring(load_base(base, "lora", device), chat, rows, pairs)


def documentation_rows(out: Path) -> list[dict[str, Any]]:
    """Look-up and summary rows of the installed Python, in the order of their hashes."""
    job = PythonDocsJob(packages=["stdlib"], max_lookup_rows=200, max_summary_rows=100, max_rows_per_package=400)
    run_worker("tasks.data.ingestion.workers.build_python_docs", job, out)
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def compare_training(method: str, model: Any, chat: Chat, rows: list[dict[str, Any]], pairs: int) -> None:
    """One forward and backward pass over the same rows, padded with the library's loss against packed."""
    batch = [chat.scored(row["messages"]) for row in rows[:BATCH_ROWS]]
    padded, packed = pad(batch, chat), to_tensors(batch)
    tokens = sum(len(row.ids) for row in batch)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "padded": lambda: model(**padded).loss,
        "packed": lambda: scored_losses(model, packed).mean(),
    }
    seconds = alternate({name: lambda way=way: step(model, way) for name, way in ways.items()}, pairs)
    with torch.no_grad():
        difference = abs(float(ways["padded"]()) - float(ways["packed"]()))
    report(f"training {method}, tokens/s", seconds, tokens)
    print(f"  loss differs by {difference:.1e} nats")


def pad(batch: list[ScoredSequence], chat: Chat) -> dict[str, torch.Tensor]:
    longest = max(len(row.ids) for row in batch)
    filler = chat.tokenizer.pad_token_id or 0
    ids = [[*row.ids, *[filler] * (longest - len(row.ids))] for row in batch]
    mask = [[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in batch]
    labels = [[-100] * row.start + list(row.ids[row.start :]) + [-100] * (longest - len(row.ids)) for row in batch]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "labels": torch.tensor(labels)}


def step(model: Any, loss: Callable[[], torch.Tensor]) -> None:
    model.zero_grad()
    loss().backward()


def compare_scoring(model: Any, chat: Chat, rows: list[dict[str, Any]], pairs: int) -> None:
    """Four answers to each question, through lm-eval's own class against ours."""
    pool = [
        TestQuestion(str(i), "docs", r["messages"][0]["content"], r["messages"][1]["content"])
        for i, r in enumerate(rows)
    ]
    choices = choose_distractors(pool)
    requests = []
    for row in pool[:EVAL_ITEMS]:
        question = f"Question: {row.prompt}\nAnswer:"
        requests += [Instance("loglikelihood", {}, (question, f" {choice}"), 0) for choice in choices[row.row_id]]
    models = {
        "HFLM": HFLM(pretrained=model, tokenizer=chat.tokenizer, batch_size=HFLM_BATCH),
        "packed": PackedLM(model, chat, batch_tokens=512, max_length=2048, name="packed", way="packed"),
    }
    answers: dict[str, list[tuple[float, bool]]] = {}

    def score(name: str) -> None:
        answers[name] = models[name].loglikelihood(requests, disable_tqdm=True)

    seconds = alternate({name: lambda name=name: score(name) for name in models}, pairs)
    report("scoring, requests/s", seconds, len(requests))
    differences = [abs(a[0] - b[0]) for a, b in zip(answers["HFLM"], answers["packed"], strict=True)]
    print(f"  log-probabilities differ by {max(differences):.1e} at most")


def alternate(ways: dict[str, Callable[[], None]], pairs: int) -> dict[str, list[float]]:
    """Seconds of each way, run in turns after one warm-up each."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(pairs):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def report(title: str, seconds: dict[str, list[float]], amount: int) -> None:
    (slow, slow_seconds), (fast, fast_seconds) = seconds.items()
    ratios = [a / b for a, b in zip(slow_seconds, fast_seconds, strict=True)]
    rates = {name: amount / statistics.median(times) for name, times in seconds.items()}
    print(f"{title}: {slow} {rates[slow]:.1f}, {fast} {rates[fast]:.1f}")
    print(
        f"  {fast} is {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} pairs)"
    )


if __name__ == "__main__":
    main()
