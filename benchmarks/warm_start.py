"""From scratch or from the champion: a domain grows by another package's documentation, and three LoRA arms learn it.

A champion learns the rows of `--old`. Then those of `--new` come, and in one run, on the same held-out items, three
arms train: from scratch on all rows, and from the champion with a replay share of 0 and of 0.5. A row's domain is its
source. Losses are nats per completion token; an interval is of the difference, paired by item.

    python -m benchmarks.warm_start --store DIR [--old stdlib] [--new pandas] [--lookups 400] [--summaries 200]
        [--preset demo]
"""

import argparse
import json
from pathlib import Path
from typing import Any

from data_contracts.jobs.data import PythonDocsJob
from data_contracts.reports import RunReport
from flows.cli.options import prepared_spec
from tasks.evaluation.core.candidate import NLL
from tasks.evaluation.core.comparison import bootstrap
from tasks.evaluation.core.samples import Metric, gather, read_facts, read_samples
from tasks.evaluation.core.stats import Bootstrap, ratio
from tasks.runtime.processes import run_worker
from tasks.runtime.store import Store

ARMS = {"lora": "from scratch", "warm_0": "from the champion, replay 0", "warm_50": "from the champion, replay 0.5"}
VARIANTS = [
    {"name": f"warm_{percent}", "method": "lora", "settings": {"warm_start": "champion", "replay_share": percent / 100}}
    for percent in (0, 50)
]
SETTINGS = {
    "train.methods": ["lora"], "evaluate.tasks": ["domain_nll"], "evaluate.forms": [], "evaluate.sample_questions": 1,
    "gates.min_retention": None, "gates.max_accuracy_drop": None, "gates.max_forgetting_nats": None,
    "gates.max_forgetting_accuracy": None, "gates.min_stop_rate": None, "gates.min_slice_gain_nats": None,
    "evaluate.max_items": 2000, "curate.max_test_rows": 2000,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="kept, so that a stopped benchmark resumes")
    parser.add_argument("--old", default="stdlib")
    parser.add_argument("--new", default="pandas")
    parser.add_argument("--lookups", type=int, default=400)
    parser.add_argument("--summaries", type=int, default=200)
    parser.add_argument("--preset", default="demo")
    arguments = parser.parse_args()
    files = [rows_of(arguments, package) for package in (arguments.old, arguments.new)]
    first = run(arguments, files[:1], [])
    second = run(arguments, files, VARIANTS)
    note(first, second, Path(arguments.store), [file.name for file in files])


def rows_of(arguments: argparse.Namespace, package: str) -> Path:
    """Question and answer rows from the docs of one package."""
    out = arguments.store / "rows" / package
    job = PythonDocsJob(
        packages=[package], max_lookup_rows=arguments.lookups, max_summary_rows=arguments.summaries,
        max_rows_per_package=max(arguments.lookups, arguments.summaries),
    )  # fmt: skip
    run_worker("tasks.data.ingestion.workers.build_python_docs", job, out)
    file: Path = out / f"{package}.jsonl"
    lines = (json.loads(line) for line in (out / "rows.jsonl").read_text(encoding="utf-8").splitlines())
    file.write_text("".join(json.dumps({"messages": line["messages"]}) + "\n" for line in lines), encoding="utf-8")
    return file


def run(arguments: argparse.Namespace, files: list[Path], variants: list[dict[str, Any]]) -> RunReport:
    settings = SETTINGS | {"data.source": [str(file) for file in files], "train.variants": variants}
    changes = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
    spec = prepared_spec(arguments.preset, [*changes, f"store.root={arguments.store}"])
    from flows.retrain import retrain

    report = retrain(spec)
    assert report and report.gate.verdict == "pass", "without a champion there is nothing to start from"
    return report


def note(first: RunReport, second: RunReport, root: Path, sources: list[str]) -> None:
    store = Store(root)
    read = {item.target: read_samples(store.path(item.samples).read_text().splitlines()) for item in second.evaluations}
    facts = read_facts(store.path(second.evaluations[0].facts).read_text().splitlines())
    # The arm from scratch is the one that may be released, so the champion it meets is the first run's.
    nll = gather(read, NLL, {name: [name] for name in ("base", "champion", *ARMS)})
    assert nll
    draws = bootstrap(nll, facts, second_gates(second))
    trained = {arm.name: arm for arm in second.arms}
    begun = first.arms[0]
    print(f"champion: {begun.train_rows} rows, {begun.train_seconds / 60:.1f} minutes, {begun.threads} threads")
    for name, label in ARMS.items():
        arm = trained[name]
        print(f"{label}: {arm.train_rows} rows, {arm.steps} steps, {arm.train_seconds / 60:.1f} minutes")
    for domain in ("all", *sources):
        inside = [float(domain in ("all", facts[row].source)) for row in nll.row_ids]
        print(f"\n{domain}: {sum(inside):.0f} held-out items")
        for name in ("base", "champion", *ARMS):
            print(f"  {ARMS.get(name, name):<30} {line(nll, draws, inside, name)}")


def line(nll: Metric, draws: Bootstrap, inside: list[float], name: str) -> str:
    """The loss inside a domain, and what it is below the arm from scratch and below the champion."""
    tokens_I = nll.tokens_I * inside
    text = f"loss {draws.estimate(ratio, nll.first(name) * inside, tokens_I).value:.3f}"
    for other in ("champion", "lora"):
        if other != name and name != "base":
            found = draws.estimate(ratio, (nll.first(name) - nll.first(other)) * inside, tokens_I)
            text += f"   minus {ARMS.get(other, other)}'s {found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
    return text


def second_gates(report: RunReport) -> Any:
    from data_contracts.run_spec import RunSpec

    return RunSpec.model_validate(report.spec).gates


if __name__ == "__main__":
    main()
