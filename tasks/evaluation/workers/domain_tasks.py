"""The lm-eval tasks built from the frozen test split: `domain_nll`, `domain_choice` and `domain_generate`.

Items hold the very text the training saw: the base's own chat template, the answer with its stop token.
"""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import datasets
from lm_eval.api.task import ConfigurableTask

from data_contracts.errors import DataError, Problem
from data_contracts.jobs.evaluation import EvaluateJob
from tasks.data.curation.core.groups import join
from tasks.evaluation.core.items import (
    CHOICES,
    TestQuestion,
    choose_distractors,
    cluster_keys,
    item_slices,
    true_place,
    word_overlap_guess,
)
from tasks.evaluation.core.text_scores import exact_match, repetition, rouge_l
from tasks.models.workers.chat_template import Chat
from tasks.models.workers.generation import Written


class TaskItem(TypedDict, total=False):
    """A document of an lm-eval task. Each task has the fields that its prompt and its metrics need, see `build_items`."""

    row_id: str
    source: str
    slice: str | None
    cluster: str | None
    question: str
    prompt: str
    passage: str  # of general text: all of it is scored
    completion: str
    answer: str
    tokens: int
    total_tokens: int
    choices: list[str]
    choice_tokens: list[int]
    label: int
    overlap_guess: int


class SplitRow(TypedDict):
    """A row of the test split, as its JSON line holds it."""

    row_id: str
    source: str
    messages: list[dict[str, str]]
    slice: NotRequired[str | None]
    cluster: NotRequired[str | None]


_LOWER = ("nll_nats", "repetition")  # better


def build_items(test: Path, chat: Chat, max_items: int, max_tokens: int, *, with_choices: bool) -> list[TaskItem]:
    """Items of the first `max_items` test rows (files are sorted by row id, a hash) that fit into `max_tokens`.

    Each: row_id, source, question, prompt and completion as text, answer (the completion without its stop token), tokens
    (of the completion), total_tokens; and, if asked for and the split has enough different answers, choices (as text),
    choice_tokens, label, overlap_guess.
    """
    with test.open(encoding="utf-8") as file:
        rows: list[SplitRow] = [json.loads(line) for line in file]
    items: list[TaskItem] = []
    for row in rows:
        item = _item(row, chat)
        items += [item] if item["total_tokens"] <= max_tokens else []
        if len(items) == max_items:
            break
    if not items:
        raise DataError(Problem("no test row is short enough to score", test.name, f"{max_tokens} tokens",
                                "raise train.max_tokens"))  # fmt: skip
    return _with_choices(items, rows, chat) if with_choices else items


def _item(row: SplitRow, chat: Chat) -> TaskItem:
    prompt, completion = chat.split(row["messages"])
    tokens = len(chat.encode(completion))
    stop = max((stop for stop in chat.stops if completion.endswith(stop)), key=len)
    return {
        "row_id": row["row_id"], "source": row["source"], "slice": row.get("slice"), "cluster": row.get("cluster"),
        "question": row["messages"][-2]["content"], "prompt": prompt, "completion": completion,
        "answer": completion.removesuffix(stop), "tokens": tokens, "total_tokens": len(chat.encode(prompt)) + tokens,
        "choices": [], "choice_tokens": [], "label": 0, "overlap_guess": 0,
    }  # fmt: skip


def _with_choices(items: list[TaskItem], rows: list[SplitRow], chat: Chat) -> list[TaskItem]:
    pool = [
        TestQuestion(r["row_id"], r["source"], r["messages"][-2]["content"], r["messages"][-1]["content"]) for r in rows
    ]
    wanted = {item["row_id"] for item in items}
    choices = choose_distractors(pool, wanted) if len(pool) >= CHOICES else {}
    questions = {row["row_id"]: row["messages"][:-1] for row in rows}
    return [item | _choices(item, questions[item["row_id"]], choices.get(item["row_id"], []), chat) for item in items]


def _choices(item: TaskItem, question: list[dict[str, str]], choices: Sequence[str], chat: Chat) -> TaskItem:
    if not choices:
        return {}
    texts = [chat.split([*question, {"role": "assistant", "content": choice}])[1] for choice in choices]
    return {
        "choices": texts, "choice_tokens": [len(chat.encode(text)) for text in texts],
        "label": true_place(item["row_id"]), "overlap_guess": word_overlap_guess(item["question"], list(choices)),
    }  # fmt: skip


def facts(items: list[TaskItem]) -> list[dict[str, Any]]:
    """What is known of each item in addition to its scores: row_id, cluster, bytes of the answer, and its slices."""
    keys = {item["row_id"]: cluster_keys(item["row_id"], item["answer"], item["cluster"]) for item in items}
    clusters = join(keys).groups
    return [
        {
            "row_id": item["row_id"], "cluster": clusters[item["row_id"]], "bytes": len(item["answer"].encode()),
            **item_slices(item["source"], item["question"], item["answer"], item["total_tokens"], item["slice"]),
        }
        for item in items
    ]  # fmt: skip


class TextTask(ConfigurableTask):
    """An lm-eval task over ready-made items: the prompt is passed on as it is."""

    def __init__(
        self, name: str, output_type: str, metrics: Collection[str], items: list[TaskItem], **fields: Any
    ) -> None:
        super().__init__(
            config={
                "task": name,
                "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list([dict(item) for item in items])},
                "test_split": "test",
                "output_type": output_type,
                "doc_to_text": lambda item: item["prompt"],
                "target_delimiter": "",
                "metric_list": [
                    {"metric": m, "aggregation": "mean", "higher_is_better": m not in _LOWER} for m in metrics
                ],
                **fields,
            }
        )

    def fewshot_context(self, doc: TaskItem, num_fewshot: int, *args: Any, **kwargs: Any) -> str:
        return doc["prompt"]


def domain_tasks(job: EvaluateJob, items: list[TaskItem], chat: Chat) -> dict[str, TextTask]:
    """Those of the three that the job names, each with its items. A task without items is left out."""
    most = job.generate_tokens
    answered = [item for item in items if item["tokens"] <= most and _has_room(item, most, job.max_tokens)]
    chosen = [item for item in items if item["choices"]]
    tasks = {
        "domain_nll": (domain_nll, items),
        "domain_choice": (domain_choice, chosen),
        "domain_generate": (lambda items: domain_generate(items, chat, most), answered[: job.generate_items]),
    }
    return {name: task(own) for name, (task, own) in tasks.items() if name in job.tasks and own}


def _has_room(item: TaskItem, most_written: int, max_tokens: int) -> bool:
    return item["total_tokens"] - item["tokens"] + most_written <= max_tokens


def domain_nll(items: list[TaskItem]) -> TextTask:
    """Summed loss of the true completion, in nats, per item."""
    return TextTask(
        "domain_nll", "loglikelihood", ["nll_nats"], items,
        doc_to_target=lambda item: item["completion"],
        process_results=lambda item, results: {"nll_nats": -results[0][0]},
    )  # fmt: skip


def domain_choice(items: list[TaskItem]) -> TextTask:
    """Is the true answer the most likely of four, by mean log-probability per token? Chance is 25 %."""
    return TextTask(
        "domain_choice", "multiple_choice", ["accuracy"], items,
        doc_to_choice=lambda item: item["choices"],
        doc_to_target=lambda item: item["label"],
        process_results=_pick,
    )  # fmt: skip


def _pick(item: TaskItem, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    per_token = [result[0] / tokens for result, tokens in zip(results, item["choice_tokens"], strict=True)]
    return {"accuracy": float(per_token.index(max(per_token)) == item["label"])}


def domain_generate(items: list[TaskItem], chat: Chat, most_tokens: int) -> TextTask:
    """What the model answers, greedily: rouge_l, exact_match, stopped (it ended the answer), repetition."""

    def reference(item: TaskItem) -> str:
        return chat.read(chat.encode(item["completion"]))

    return TextTask(
        "domain_generate", "generate_until", ["rouge_l", "exact_match", "stopped", "repetition"], items,
        doc_to_target=reference,
        generation_kwargs={"until": [], "max_gen_toks": most_tokens, "do_sample": False},
        process_results=lambda item, results: _grade(reference(item), results[0]),
    )  # fmt: skip


def _grade(reference: str, written: Written) -> dict[str, float]:
    return {
        "rouge_l": rouge_l(reference, written.text),
        "exact_match": exact_match(reference, written.text),
        "stopped": float(written.stopped),
        "repetition": repetition(written.text),
    }
