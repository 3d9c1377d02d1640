"""The tasks of an evaluation by name: ours, those of the user's folder, lm-eval's."""

from collections.abc import Sequence
from typing import Any

from lm_eval.tasks import TaskManager

from data_contracts.errors import ConfigError, Problem
from data_contracts.jobs.evaluation import EvaluateJob
from data_contracts.run_spec import DOMAIN_TASKS
from tasks.evaluation.workers.domain_tasks import TaskItem, domain_tasks
from tasks.evaluation.workers.general_tasks import GENERAL_TASKS, general_tasks
from tasks.models.workers.chat_template import Chat
from tasks.runtime.workers.harness import say

_NEEDS = {
    "domain_choice": "three other answers to choose from",
    "domain_generate": "an answer of at most evaluate.generate_tokens tokens, and room for it in train.max_tokens",
}


def all_tasks(job: EvaluateJob, items: list[TaskItem], chat: Chat) -> dict[str, Any]:
    """Every task of an evaluation by its name. Raises ConfigError for an unavailable task."""
    own = domain_tasks(job, items, chat)
    for name in (name for name in DOMAIN_TASKS if name in job.tasks and name not in own):
        say("note", text=f"{name} is left out: no test row has {_NEEDS[name]}")
    return own | further_tasks(job.tasks, job.task_folder, chat, job.max_tokens)


def further_tasks(names: Sequence[str], folder: str | None, chat: Chat | None, max_tokens: int) -> dict[str, Any]:
    """The named tasks that are not built from the test split."""
    others = [name for name in names if name not in (*DOMAIN_TASKS, *GENERAL_TASKS)]
    found: dict[str, Any] = dict(general_tasks(names, chat, max_tokens))
    return found | (_fetch(_manager(others, folder), others) if others else {})


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
        raise ConfigError(Problem(f"the data of {', '.join(names)} is not available: {error}", "evaluate.tasks",
                                  act="go online once so that they are cached, or take the task out")) from error  # fmt: skip
    return loaded
