"""The two lm-eval tasks built from the frozen test split: `domain_nll` and `domain_choice`.

Items hold the very text the training saw: the base's own chat template, the answer with its stop token.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask

from data_contracts.errors import DataError, Problem
from tasks.core.choice import CHOICES, TestRow, choose_distractors, true_place, word_overlap_guess
from tasks.workers.chat import Chat

Item = dict[str, Any]
DOMAIN_TASKS = ("domain_nll", "domain_choice")


def build_items(test: Path, chat: Chat, max_items: int, max_tokens: int) -> list[Item]:
    """Items of the first `max_items` test rows (files are sorted by row id, a hash) that fit into `max_tokens`.

    Each: row_id, source, question, prompt and completion as text, tokens (of the completion), and, where the split has enough
    different answers, choices (as text), choice_tokens, label, overlap_guess.
    """
    rows = [json.loads(line) for line in test.open()]
    pool = [TestRow(r["row_id"], r["source"], r["messages"][-2]["content"], r["messages"][-1]["content"]) for r in rows]
    choices = choose_distractors(pool) if len(pool) >= CHOICES else {}
    items = [_item(row, choices.get(row["row_id"]), chat) for row in rows]
    short = [item for item in items if item["total_tokens"] <= max_tokens][:max_items]
    if not short:
        raise DataError(Problem("no test row is short enough to score", test.name, f"{max_tokens} tokens",
                                "raise train.max_tokens"))  # fmt: skip
    return short


def _item(row: dict[str, Any], choices: Sequence[str] | None, chat: Chat) -> Item:
    prompt, completion = chat.split(row["messages"])
    tokens = len(chat.encode(completion))
    item: Item = {"row_id": row["row_id"], "source": row["source"], "prompt": prompt, "completion": completion}
    item |= {"question": row["messages"][-2]["content"]}
    item |= {"tokens": tokens, "total_tokens": len(chat.encode(prompt)) + tokens, "choices": []}
    item |= {"choice_tokens": [], "label": 0, "overlap_guess": 0}
    if choices:
        question = row["messages"][:-1]
        texts = [chat.split([*question, {"role": "assistant", "content": choice}])[1] for choice in choices]
        item |= {"choices": texts, "choice_tokens": [len(chat.encode(text)) for text in texts]}
        item |= {"label": true_place(row["row_id"])}
        item |= {"overlap_guess": word_overlap_guess(question[-1]["content"], list(choices))}
    return item


class DomainTask(ConfigurableTask):
    """An lm-eval task over ready-made items: the prompt is passed on as it is."""

    def __init__(self, name: str, output_type: str, metric: str, items: list[Item], **fields: Any) -> None:
        super().__init__(
            config={
                "task": name,
                "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(items)},
                "test_split": "test",
                "output_type": output_type,
                "doc_to_text": lambda item: item["prompt"],
                "target_delimiter": "",
                "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": metric == "accuracy"}],
                **fields,
            }
        )

    def fewshot_context(self, doc: Item, num_fewshot: int, *args: Any, **kwargs: Any) -> str:
        prompt: str = doc["prompt"]
        return prompt


def domain_nll(items: list[Item]) -> DomainTask:
    """Summed loss of the true completion, in nats, per item."""
    return DomainTask(
        "domain_nll", "loglikelihood", "nll_nats", items,
        doc_to_target=lambda item: item["completion"],
        process_results=lambda item, results: {"nll_nats": -results[0][0]},
    )  # fmt: skip


def domain_choice(items: list[Item]) -> DomainTask:
    """Is the true answer the most likely of four, by mean log-probability per token? Chance is 25 %."""
    return DomainTask(
        "domain_choice", "multiple_choice", "accuracy", items,
        doc_to_choice=lambda item: item["choices"],
        doc_to_target=lambda item: item["label"],
        process_results=_pick,
    )  # fmt: skip


def _pick(item: Item, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    per_token = [result[0] / tokens for result, tokens in zip(results, item["choice_tokens"], strict=True)]
    return {"accuracy": float(per_token.index(max(per_token)) == item["label"])}
