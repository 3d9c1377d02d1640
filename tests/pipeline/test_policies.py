"""Stage keys change with content and code, not with places. Run: pytest tests/pipeline/test_policies.py"""

import ast
import inspect
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from prefect import Task

from data_contracts.data_reports import FileRef
from data_contracts.data_spec import CurateSpec
from data_contracts.errors import ConfigError, Problem, TransientError
from data_contracts.reports import BaseModelRef
from data_contracts.run_spec import EvaluateSpec
from data_contracts.stage_inputs import HASHED_ONLY, EvaluationInputs
from data_contracts.train_spec import TrainSpec
from tasks.pipeline import stages
from tasks.pipeline.policies import POLICIES, stage, stage_key
from tasks.runtime.store import Store


class Failed:
    """A Prefect state, as far as a retry condition reads it."""

    def __init__(self, error):
        self.error = error

    def result(self, raise_on_failure):
        assert raise_on_failure is False
        return self.error


@pytest.mark.parametrize(
    ("error", "retried"),
    [
        (TransientError(Problem("killed by signal 9")), True),
        (ConnectionError("refused"), True),
        (RuntimeError("sqlite3.OperationalError: database is locked"), True),
        (ConfigError(Problem("no such base")), False),
        (ValueError("a bug"), False),
    ],
)
def test_only_a_transient_error_is_retried(error, retried):
    task = stage("gate")(lambda: None)
    assert task.retry_condition_fn(task, None, Failed(error)) is retried


def test_a_key_does_not_depend_on_where_the_store_is():
    keys = {stage_key("curate", {"store": Store(Path(root)), "spec": CurateSpec()}) for root in ("a", "b")}
    assert len(keys) == 1


def test_a_field_of_a_group_counts_as_a_single_argument_does():
    def key(**changes):
        base = BaseModelRef(
            name="tiny", digest="b", path="bases/tiny", note="", revision=None, stops=[], chat_template=None
        )
        inputs = EvaluationInputs(
            **{"base": base, "test": FileRef(path="t", sha256="1"), "spec": EvaluateSpec(), "task_files": None}
            | {"max_tokens": 256, "precision": "auto", "threads": 1} | changes
        )  # fmt: skip
        return stage_key("evaluate", {"inputs": inputs})

    assert key() == key(threads=2)
    assert key() != key(precision="fp32")
    assert key() != key(task_files=FileRef(path="tasks", sha256="2"))


def test_a_name_that_a_person_chose_is_no_setting_that_is_left_out():
    def key(numbers):
        return stage_key("gate", {"comparison": numbers})

    assert key({"slot": 1.0}) != key({"slot": 2.0})


def test_a_key_depends_on_a_files_content_not_on_its_path():
    def key(path, sha256):
        return stage_key("train", {"rows": FileRef(path=path, sha256=sha256)})

    assert key("a", "1") == key("b", "1") != key("a", "2")


def test_settings_that_change_the_result_change_the_key_and_others_do_not():
    def key(**settings):
        return stage_key("train", {"settings": TrainSpec(**settings)})

    assert key() == key(threads=1) == key(checkpoint_steps=7) == key(methods=["qlora"])
    assert key() != key(learning_rate=1e-5)


def test_every_parameter_of_a_stage_is_read_or_marked_as_hashed_only():
    tasks = [task for task in vars(stages).values() if isinstance(task, Task)]
    assert len(tasks) == len(POLICIES)
    marked = 0
    for task in tasks:
        function = inspect.unwrap(task.fn)
        hints = get_type_hints(function, include_extras=True)
        hashed_only = {name for name, hint in hints.items() if HASHED_ONLY in getattr(hint, "__metadata__", ())}
        tree = ast.parse(inspect.getsource(function))
        read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert hints.keys() - {"return"} - read == hashed_only, task.name
        marked += len(hashed_only)
    assert marked > 0


def test_no_stage_takes_more_than_six_parameters_and_none_is_untyped():
    for task in (task for task in vars(stages).values() if isinstance(task, Task)):
        parameters = inspect.signature(task.fn).parameters
        assert len(parameters) <= 6, task.name
        assert Any not in get_type_hints(task.fn).values(), task.name
