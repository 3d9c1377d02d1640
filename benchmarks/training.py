"""Training speed and memory against what one would use instead: TRL, LLaMA-Factory, and a plain transformers Trainer.

Every way trains in a process of its own on the same rows, model, adapter shape, precision and threads; the ways take
turns, and each ratio is taken within a turn. Tokens are the rows' own, padding not counted. Speed leaves out loading
and the first step; memory is the peak of the process, loading included.

    python -m benchmarks.training [--rows 64] [--turns 3] [--method qlora] [--data FILE.json] [--trl PYTHON]
        [--llama-factory PYTHON]

`--trl`, `--llama-factory`: the Python of an environment that has it (`pip install trl`, `pip install llamafactory`);
without one that peer is left out. `--data`: rows as alpaca JSON; without it the documentation of the installed Python.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-rows", type=int, default=8)
    parser.add_argument("--method", choices=["lora", "qlora"], default="lora")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--trl", type=Path, metavar="PYTHON")
    parser.add_argument("--llama-factory", type=Path, metavar="PYTHON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), arguments)


def compare(folder: Path, arguments: argparse.Namespace) -> None:
    spec = prepare(folder, arguments)
    ways = {"tunegate": sys.executable, "tunegate, checkpointing": sys.executable, "Trainer, padded": sys.executable}
    for name, peer in (("TRL", arguments.trl), ("LLaMA-Factory", arguments.llama_factory)):
        if peer:
            ways |= {name + form: str(peer) for form in ("", ", packed", ", checkpointing")}
    results: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for turn in range(arguments.turns):
        for way, python in ways.items():
            results[way].append(run(way, python, folder, spec))
            print(f"turn {turn + 1}: {way} {json.dumps(results[way][-1])}", file=sys.stderr)
    report(results, spec)


def prepare(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Base, step-0 adapter, rows as text and as tokens; what every way gets."""
    from data_contracts.jobs.models import InitAdapterJob, PrepareBaseJob
    from data_contracts.train_spec import TrainSpec
    from tasks.models.base import start_settings
    from tasks.models.workers.chat_template import load_chat
    from tasks.models.workers.prepare_base import prepare as prepare_base
    from tasks.runtime.processes import run_worker

    base = Path(prepare_base(PrepareBaseJob(base="builtin:smollm2-135m", revision=None), folder / "base")["path"])
    settings = TrainSpec(rank=16, alpha=32)
    start = start_settings("lora", 17, settings, arguments.precision)
    assert start
    run_worker("tasks.models.workers.init_adapter", InitAdapterJob(base=base, settings=start), folder / "step0")
    chat = load_chat(base)
    conversations = list(own_rows(arguments.data) if arguments.data else documentation_rows(folder / "docs"))
    texts = [chat.split(messages) for messages in conversations]
    sizes = [len(chat.encode(prompt)) + len(chat.encode(completion)) for prompt, completion in texts]
    chosen = [i for i, size in enumerate(sizes) if size <= 1024][: arguments.rows]
    with (folder / "train.jsonl").open("w") as file:
        for i in chosen:
            row = {"row_id": str(i), "source": "benchmark", "line": i, "messages": conversations[i]}
            file.write(json.dumps(row) + "\n")
    (folder / "texts.json").write_text(json.dumps([texts[i] for i in chosen]))
    (folder / "validation.jsonl").write_text("")
    return {
        "rank": settings.rank, "alpha": settings.alpha, "seed": 17,
        "base": str(base), "step0": str(folder / "step0" / "adapter"), "texts": str(folder / "texts.json"),
        "train": str(folder / "train.jsonl"), "validation": str(folder / "validation.jsonl"),
        "tokens": sum(sizes[i] for i in chosen), "batch_rows": arguments.batch_rows, "method": arguments.method,
        "precision": arguments.precision, "threads": arguments.threads, "learning_rate": 2e-4,
    }  # fmt: skip


def own_rows(file: Path) -> Iterator[list[dict[str, str]]]:
    for row in json.loads(file.read_text()):
        question = f"{row['instruction']}\n{row.get('input', '')}".strip()
        yield [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]


def documentation_rows(out: Path) -> Iterator[list[dict[str, str]]]:
    from data_contracts.jobs.data import PythonDocsJob
    from tasks.runtime.processes import run_worker

    job = PythonDocsJob(packages=["stdlib"], max_lookup_rows=300, max_summary_rows=150, max_rows_per_package=400)
    run_worker("tasks.data.ingestion.workers.build_python_docs", job, out)
    for line in (out / "rows.jsonl").read_text().splitlines():
        yield json.loads(line)["messages"]


def run(way: str, python: str, folder: Path, spec: dict[str, Any]) -> dict[str, float]:
    from tasks.runtime.processes import worker_environment

    out = Path(tempfile.mkdtemp(dir=folder))
    (out / "spec.json").write_text(json.dumps(spec | {"out": str(out)}))
    command = [python, "-m", "benchmarks.ways", way, str(out / "spec.json")]
    environment = worker_environment() if python == sys.executable and way.startswith("tunegate") else None
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        raise SystemExit(f"{way} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(found[0].removeprefix("RESULT ")))


def report(results: dict[str, list[dict[str, float]]], spec: dict[str, Any]) -> None:
    own, best = results["tunegate"], results["tunegate, checkpointing"]
    print(f"{spec['method']}, {spec['precision']}, {spec['threads']} threads, {spec['tokens']:,} tokens in rows")
    print(
        f"{'way':<26}{'tokens/s':>10}{'ours is x faster':>26}{'peak GB':>9}{'ours':>7}{'checkp.':>9}{'first loss':>12}"
    )
    for way, found in results.items():
        rates = [item["tokens_per_s"] for item in found]
        ratios = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(own, found, strict=True)]
        peak, mine, least = (statistics.median(item["peak_bytes"] for item in items) for items in (found, own, best))
        span = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        shares = f"{mine / peak:>7.0%}{least / peak:>9.0%}"
        loss = statistics.mean(item["first_loss"] for item in found)
        print(f"{way:<26}{statistics.median(rates):>10.1f}{span:>26}{peak / 1e9:>9.2f}{shares}{loss:>12.4f}")
    limit = max(item["gemm_gflops"] for found in results.values() for item in found)
    reached = statistics.median(item["tokens_per_s"] for item in own)
    needed = own[0]["flop_per_token"]
    print(f"largest fp32 product on this machine: {limit:.0f} GFLOP/s; {needed / 1e6:.0f} MFLOP a token are needed:")
    print(f"tunegate is at {reached * needed / limit / 1e9:.0%} of that limit")


if __name__ == "__main__":
    main()
