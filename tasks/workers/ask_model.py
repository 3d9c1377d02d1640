"""Ask a registered model in a fresh process: `python -m tasks.workers.ask_model spec.json out/`.

spec: tracking_uri, model (its verified folder), label, store (its folder, where the base lies), questions, max_new_tokens.
report: answers.
"""

import os
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd

from tasks.workers.device import choose_device
from tasks.workers.harness import main, say


def ask(spec: dict[str, Any], out: Path) -> dict[str, Any]:
    choose_device()
    # From a tracking server the version's files come into a temporary folder, from where no base can be found.
    os.environ.setdefault("TUNEGATE_STORE_DIR", spec["store"])
    mlflow.set_tracking_uri(spec["tracking_uri"])
    mlflow.set_registry_uri(spec["tracking_uri"])
    say("note", text=f"loading {spec['label']} from the registry")
    model = mlflow.pyfunc.load_model(spec["model"])
    questions = pd.DataFrame({"question": spec["questions"]})
    return {"answers": list(model.predict(questions, params={"max_new_tokens": spec["max_new_tokens"]}))}


if __name__ == "__main__":
    main(ask)
