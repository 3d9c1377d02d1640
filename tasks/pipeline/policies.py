"""Every retry, timeout and cache policy of the project, on one screen.

data_contracts/retry_table.py says which errors are retried.

A stage's cache key is its name, its arguments (the configuration it uses and the digests of its inputs), the code that
shapes its result (tasks/runtime/fingerprint.py) and the versions of the libraries that do. It holds no run id and no path.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from prefect import Task
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from pydantic import BaseModel

from data_contracts.data_reports import FileRef
from data_contracts.data_spec import Section
from data_contracts.errors import TransientError, TunegateError
from data_contracts.redaction import has_secret
from data_contracts.reports import AdapterRef, BaseModelRef
from data_contracts.retry_table import explained, is_transient
from data_contracts.run_spec import RunSpec, StoreSpec
from data_contracts.stage_inputs import StageInputs
from tasks.data.validation import check_rows as validation
from tasks.evaluation import evaluate as evaluation
from tasks.models import base as bases
from tasks.pipeline.notifications import work_begins
from tasks.runtime.console import note
from tasks.runtime.fingerprint import code_digest, library_versions
from tasks.runtime.store import Store

# Three more tries, each wait up to half as long again: a server that restarts within a minute is back in time.
_DELAYS_SECONDS, _JITTER = (2.0, 15.0, 60.0), 0.5
_HOURS = 3600

P = ParamSpec("P")
R = TypeVar("R")

# Arguments, and settings, that change how a result is reached, not what it is.
NOT_IDENTITY = frozenset(
    {
        "store",
        "methods",
        "seeds",
        "variants",
        "threads",
        "parallel",
        "slot",
        "checkpoint_steps",
        "max_loss_rise_nats",
        "engine",
        "start",  # where training began is in the digests of its adapter and rows
        "warm_start",
        "replay_share",
        "task_folder",
        "schedule",
    }
)
_NOT_IDENTITY_OF_REPORTS = frozenset({"start"})
_MODEL_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True)
class Policy:
    code: tuple[str, ...]  # modules, with what they import and shapes results; files by their path in the repository
    libraries: tuple[str, ...] = ()
    timeout_seconds: float = 1 * _HOURS
    version: int = 1  # raise it where the result changes by code that no digest sees: a contract, the store
    device: bool = False  # it fills the GPU, or the cores: one such stage at a time (tasks/pipeline/device_lock.py)


# The one contract with formulas: ids of rows, and what each reason leads to.
_ROWS = "data_contracts.rows"
_REPORTING = tuple(f"tasks.reporting.{name}" for name in ("plots", "sentences", "tables", "markdown"))
_TEMPLATES = "tasks/reporting/templates"
_EVALUATION = ("tasks.evaluation.evaluate", "tasks.evaluation.workers.evaluate_models")

POLICIES = {
    "ingest": Policy(
        (_ROWS, "tasks.data.ingestion.ingest", "tasks.data.ingestion.workers.build_python_docs"),
        ("pyarrow", "datasets", "charset-normalizer"),
    ),
    "validate": Policy((_ROWS, "tasks.data.validation.validate"), ("great-expectations", *validation.CHECK_LIBRARIES)),
    "benchmarks": Policy(("tasks.evaluation.workers.benchmark_items",), ("lm-eval",)),
    "curate": Policy((_ROWS, "tasks.data.curation.curate"), ("rensa", "scipy", "xxhash")),
    "prepare_base": Policy(
        ("tasks.models.base", "tasks.models.workers.prepare_base"),
        ("torch", "transformers", "tokenizers", "gguf"),
        6 * _HOURS,
    ),
    "init_adapter": Policy(
        ("tasks.models.base", "tasks.models.workers.init_adapter"), bases.STEP0_LIBRARIES, device=True
    ),
    "choose_start": Policy(("tasks.training.warm_start",)),
    "check_tasks": Policy(("tasks.evaluation.workers.evaluate_models",), ("lm-eval",)),
    "train": Policy(
        ("tasks.training.train", "tasks.training.workers.train_adapter"),
        (*_MODEL_LIBRARIES, "accelerate", "tokenizers", "safetensors", "numpy"),
        7 * 24 * _HOURS,
        device=True,
    ),
    "evaluate": Policy(_EVALUATION, evaluation.SCORING_LIBRARIES, 24 * _HOURS, device=True),
    "compare": Policy(("tasks.evaluation.compare",), ("scipy", "numpy")),
    "serve_alone": Policy(_EVALUATION, evaluation.SCORING_LIBRARIES, 2 * _HOURS, device=True),
    "gate": Policy(("tasks.evaluation.core.gates",), ("scipy",)),
    "record": Policy(("tasks.reporting.mlflow_run", *_REPORTING), ("mlflow", "matplotlib")),
    "register": Policy(
        (
            "tasks.release.register",
            "tasks.release.workers.served_model",
            *_REPORTING,
            f"{_TEMPLATES}/card.md.j2",
        ),
        ("mlflow", "cyclonedx-python-lib", "matplotlib", "jinja2"),
    ),
    "load_back": Policy(
        ("tasks.release.release_check", "tasks.release.workers.check_release"),
        ("mlflow", *_MODEL_LIBRARIES),
        device=True,
    ),
    "promote": Policy(("tasks.release.promotion",), ("mlflow",)),
    "report": Policy(
        ("tasks.reporting.html_report", *_REPORTING, f"{_TEMPLATES}/report.html.j2"), ("matplotlib", "jinja2")
    ),
}


def stage(name: str) -> Callable[[Callable[P, R]], Task[P, R]]:
    """Make a function the Prefect task of a stage: cached by content, retried only if the error is transient."""
    policy = POLICIES[name]

    def make(function: Callable[P, R]) -> Task[P, R]:
        return Task(
            explaining(_announced(function)),
            name=name,
            persist_result=True,
            result_serializer="json",  # never pickle
            cache_policy=CacheKeyFnPolicy(cache_key_fn=lambda _, arguments: stage_key(name, arguments)),
            retries=len(_DELAYS_SECONDS),
            retry_delay_seconds=list(_DELAYS_SECONDS),
            retry_jitter_factor=_JITTER,
            retry_condition_fn=_is_retried,
            timeout_seconds=policy.timeout_seconds,
        )

    return make


def _announced(function: Callable[P, R]) -> Callable[P, R]:
    @wraps(function)
    def work(*args: P.args, **kwargs: P.kwargs) -> R:
        work_begins()  # not called where the cache has the result
        return function(*args, **kwargs)

    return work


def is_forced() -> bool:
    """Whether this stage runs because of --force: what an earlier run left is then not used. A retry is not forced."""
    context = TaskRunContext.get()
    return context is not None and bool(context.task.refresh_cache) and context.task_run.run_count <= 1


def stage_key(name: str, arguments: dict[str, Any]) -> str:
    """Content key of a stage: hex sha256, led by the stage's name so that a person finds it in the folder."""
    policy = POLICIES[name]
    parts = {
        "arguments": {argument: plain(value) for argument, value in arguments.items() if argument not in NOT_IDENTITY},
        "code": code_digest(policy.code),
        "version": policy.version,
        "libraries": library_versions(policy.libraries),
    }
    return f"{name}-{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()}"


def plain(value: Any) -> Any:
    """Arguments as JSON; files, adapters and bases by their content, wherever they are stored."""
    if isinstance(value, FileRef | AdapterRef):
        return value.sha256
    if isinstance(value, BaseModelRef):
        return value.digest
    if isinstance(value, BaseModel):
        left_out = NOT_IDENTITY if isinstance(value, Section | StageInputs) else _NOT_IDENTITY_OF_REPORTS
        return {name: plain(item) for name, item in value if name not in left_out}
    if isinstance(value, dict):  # its keys are names that people chose
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Store):
        raise TypeError("a store is a place, not an input: name its argument `store`")
    return value


def _is_retried(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    # Prefect calls only plain functions here: a partial, a method or a callable object silently never retries.
    return is_transient(state.result(raise_on_failure=False))


def explaining(function: Callable[P, R]) -> Callable[P, R]:
    """The same function with errors that a person can act on. What the table does not know is a bug and stays as it is."""

    @wraps(function)
    def attempt(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            found = explained(error, _place([*args, *kwargs.values()]))
            if found is None:
                raise
            counted = _counted(found)
            if counted is error:
                raise
            raise counted from (None if has_secret(error) else error)

    return attempt


def _counted(error: TunegateError) -> TunegateError:
    """Log that it will be retried; after the last try the error says how many there were."""
    context = TaskRunContext.get()
    if context is None or not isinstance(error, TransientError):
        return error
    tries, most = context.task_run.run_count, 1 + context.task.retries
    if tries >= most:
        problems = (replace(problem, what=f"{problem.what} (tried {tries} times)") for problem in error.problems)
        return type(error)(*problems)
    what = "; ".join(problem.what for problem in error.problems)
    note(f"{context.task_run.name}: {what}; that was try {tries} of {most}")
    return error


def _place(arguments: Iterable[Any]) -> Path | None:
    """Root of the store that a stage's arguments name."""
    for argument in arguments:
        if isinstance(argument, Store):
            return argument.root
        if isinstance(argument, RunSpec | StoreSpec):
            return Path((argument.store if isinstance(argument, RunSpec) else argument).root)
    return None
