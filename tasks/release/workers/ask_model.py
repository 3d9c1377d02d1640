"""Ask a registered model in a fresh process: `python -m tasks.release.workers.ask_model spec.json out/`.

spec: data_contracts.jobs.release.AskJob; report: AskReport.
"""

import os
import sys
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd

from data_contracts.jobs.release import AskJob, AskReport, LoadJob
from tasks.runtime.workers.device import choose_device
from tasks.runtime.workers.harness import main, say


def ask_model(job: AskJob, out: Path) -> dict[str, Any]:
    choose_device()
    answers = answer_questions(load_registered(job.version), job.questions, job.max_new_tokens)
    return AskReport(answers=answers).model_dump(mode="json")


def load_registered(version: LoadJob) -> Any:
    """The model as `mlflow.pyfunc.load_model` returns it."""
    # From a tracking server the version's files come into a temporary folder, from where no base can be found.
    os.environ.setdefault("TUNEGATE_STORE_DIR", version.store)
    mlflow.set_tracking_uri(version.tracking_uri)
    mlflow.set_registry_uri(version.tracking_uri)
    say("note", text=f"loading {version.label} from the registry")
    sys.dont_write_bytecode = True  # a compiled copy of its code would be among the version's files for a moment
    return mlflow.pyfunc.load_model(version.model)


def answer_questions(model: Any, questions: list[str], max_new_tokens: int) -> list[str]:
    return list(model.predict(pd.DataFrame({"question": questions}), params={"max_new_tokens": max_new_tokens}))


if __name__ == "__main__":
    main(ask_model, AskJob)
