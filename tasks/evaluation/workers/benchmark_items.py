"""List the items of lm-eval tasks as texts, so that training rows can be compared with them:
`python -m tasks.evaluation.workers.benchmark_items spec.json out/`.

Writes out/items.jsonl, a line for each item: kind (the task), name, text.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_contracts.jobs.evaluation import BenchmarkItemsJob
from tasks.evaluation.workers.lm_eval_tasks import further_tasks
from tasks.runtime.workers.harness import main


def list_items(job: BenchmarkItemsJob, out: Path) -> dict[str, Any]:
    """Report how many items there are."""
    tasks = further_tasks(job.tasks, job.task_folder, chat=None, max_tokens=0)
    count = 0
    with (out / "items.jsonl").open("w", encoding="utf-8") as file:
        for name, task in tasks.items():
            for number, text in enumerate(_texts(task), start=1):
                file.write(json.dumps({"kind": name, "name": f"{name}:{number}", "text": text}) + "\n")
                count += 1
    return {"items": count}


def _texts(task: Any) -> Iterator[str]:
    """The question as the model sees it, and the answer where that is a text of its own."""
    for doc in task.eval_docs:
        target = task.doc_to_target(doc)
        yield f"{task.doc_to_text(doc)} {target if isinstance(target, str) else ''}".strip()


if __name__ == "__main__":
    main(list_items, BenchmarkItemsJob)
