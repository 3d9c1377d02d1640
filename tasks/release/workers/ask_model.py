"""Ask a registered model in a fresh process: `python -m tasks.release.workers.ask_model spec.json out/`.

spec: tracking_uri, model (its verified folder), label, store (its folder, where the base lies), questions, max_new_tokens.
report: answers.
"""

import os
import sys
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd

from tasks.runtime.workers.device import choose_device
from tasks.runtime.workers.harness import main, say


def ask(spec: dict[str, Any], out: Path) -> dict[str, Any]:
    choose_device()
    return {"answers": answers(load(spec), spec["questions"], spec["max_new_tokens"])}


def load(spec: dict[str, Any]) -> Any:
    """The model as MLflow gives it to anybody."""
    # From a tracking server the version's files come into a temporary folder, from where no base can be found.
    os.environ.setdefault("TUNEGATE_STORE_DIR", spec["store"])
    mlflow.set_tracking_uri(spec["tracking_uri"])
    mlflow.set_registry_uri(spec["tracking_uri"])
    say("note", text=f"loading {spec['label']} from the registry")
    sys.dont_write_bytecode = True  # a compiled copy of its code would lie among the version's files for a moment
    return mlflow.pyfunc.load_model(spec["model"])


def answers(model: Any, questions: list[str], most_tokens: int) -> list[str]:
    return list(model.predict(pd.DataFrame({"question": questions}), params={"max_new_tokens": most_tokens}))


if __name__ == "__main__":
    main(ask)
