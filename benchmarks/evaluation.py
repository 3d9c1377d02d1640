"""Speed of scoring against lm-eval's own HFLM at the best of several batch sizes, on the same requests.

Both get the same tokens, model, precision and threads, in one process; they take turns, and each ratio is taken within a
turn, against the batch size that was fastest in it. Requests are those of a task's first items: four completions of one
question (domain_choice, from the documentation of the installed Python), and questions of general knowledge.

    python -m benchmarks.evaluation [--items 100] [--turns 3] [--tasks domain_choice general_openbookqa]
        [--batch-sizes 1 8 16 32] [--precision bf16] [--method qlora]
"""

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

BATCH_TOKENS = 512  # the default of evaluate.batch_tokens
MAX_TOKENS = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--tasks", nargs="+", default=["domain_choice", "general_openbookqa"])
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--method", choices=["lora", "qlora"], default="lora")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare_speed(Path(folder), arguments)


def compare_speed(folder: Path, arguments: argparse.Namespace) -> None:
    from data_contracts.jobs.models import PrepareBaseJob
    from tasks.evaluation.workers.packed_lm import PackedLM
    from tasks.models.workers.chat_template import load_chat
    from tasks.models.workers.loading import load_base
    from tasks.models.workers.prepare_base import prepare
    from tasks.runtime.workers.device import choose_device

    base = Path(prepare(PrepareBaseJob(base="builtin:smollm2-135m", revision=None), folder / "base")["path"])
    chat, device = load_chat(base), choose_device(arguments.precision, arguments.threads)
    ours = PackedLM(
        load_base(base, arguments.method, device), chat, arguments.batch_tokens, MAX_TOKENS, "ours", "packed"
    )
    ways = {"packed": ours, **plain_lm_eval(base, chat, device, arguments)}
    for name, task in tasks_of(folder, chat, arguments).items():
        time_task(name, task, ways, ours, arguments)


def plain_lm_eval(base: Path, chat: Any, device: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """lm-eval's class, at each batch size, over the model with transformers' own attention."""
    from lm_eval.models.huggingface import HFLM

    from tasks.models.workers.loading import load_base

    model = load_base(base, arguments.method, device)
    model.set_attn_implementation("sdpa")
    fixed = {"pretrained": model, "tokenizer": chat.tokenizer, "max_length": MAX_TOKENS}
    return {f"HFLM, {size} a batch": HFLM(**fixed, batch_size=size) for size in arguments.batch_sizes}


def tasks_of(folder: Path, chat: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.training import documentation_rows
    from data_contracts.jobs.evaluation import EvaluateJob
    from data_contracts.run_spec import EvaluateSpec
    from tasks.evaluation.workers.domain_tasks import build_items
    from tasks.evaluation.workers.lm_eval_tasks import all_tasks

    with (folder / "test.jsonl").open("w") as file:
        for number, messages in enumerate(documentation_rows(folder / "docs")):
            file.write(json.dumps({"row_id": f"{number:064}", "source": "docs", "messages": messages}) + "\n")
    items = build_items(folder / "test.jsonl", chat, arguments.items, MAX_TOKENS, with_choices=True)
    job = EvaluateJob(
        **EvaluateSpec(tasks=arguments.tasks).model_dump(exclude={"forms"}), base=str(folder / "base"),
        test=str(folder / "test.jsonl"), targets=[], before={}, precision=arguments.precision,
        threads=arguments.threads, max_tokens=MAX_TOKENS,
    )  # fmt: skip
    return all_tasks(job, items, chat)


def time_task(name: str, task: Any, ways: dict[str, Any], ours: Any, arguments: argparse.Namespace) -> None:
    task.build_all_requests(limit=arguments.items, rank=0, world_size=1)
    texts = [instance.args for instance in task.instances]
    requests = [(pair, *ours._encode_pair(*pair)) for pair in texts]
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    scores: dict[str, list[tuple[float, bool]]] = {}
    for number in range(arguments.turns):
        for way, lm in ways.items():
            started = time.monotonic()
            with redirect_stdout(io.StringIO()):  # its progress
                scores[way] = lm._loglikelihood_tokens(requests, disable_tqdm=True)
            seconds[way].append(time.monotonic() - started)
            print(f"turn {number + 1}: {name}, {way}: {seconds[way][-1]:.2f} s", file=sys.stderr)
    tokens = sum(len(context) + len(continuation) for _, context, continuation in requests)
    print(f"{name}: {len(requests)} requests, {tokens:,} tokens, {arguments.precision}, {arguments.threads} threads")
    for way, times in seconds.items():
        print(f"  {way:<20}{len(requests) / statistics.median(times):>8.1f} requests/s")
    others = [times for way, times in seconds.items() if way != "packed"]
    ratios = [min(times) / own for own, times in zip(seconds["packed"], zip(*others, strict=True), strict=True)]
    print(
        f"  packed is {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) times the fastest other"
    )
    pairs = [zip(scores["packed"], found, strict=True) for way, found in scores.items() if way != "packed"]
    worst = max(abs(a[0] - b[0]) for pair in pairs for a, b in pair)
    print(f"  largest difference of a log-probability: {worst:.1e} nats")


if __name__ == "__main__":
    main()
