"""Training speed and memory against what one would use instead: TRL's SFTTrainer, and a plain transformers Trainer.

Every way trains in a process of its own on the same rows, model, adapter shape, precision and threads; the ways take
turns, and each ratio is taken within a turn. Tokens are the rows' own, padding not counted. Speed leaves out loading and
the first step; memory is the peak of the process, loading included.

    python -m benchmarks.training [--rows 64] [--turns 3] [--method qlora] [--data FILE.json] [--peer-python PATH]

`--peer-python`: the Python of an environment that has TRL (`pip install trl`); without it TRL is left out. `--data`: rows
as alpaca JSON; without it the documentation of the installed Python.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GEMM = 2048  # rows and columns of the product that measures the machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-rows", type=int, default=8)
    parser.add_argument("--method", choices=["lora", "qlora"], default="lora")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--spec", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        spec = json.loads(arguments.spec.read_text())
        print("RESULT " + json.dumps(WAYS[arguments.way](spec)))
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), arguments)


def compare(folder: Path, arguments: argparse.Namespace) -> None:
    spec = prepare(folder, arguments)
    ways = {"tunegate": sys.executable, "tunegate, checkpointing": sys.executable, "Trainer, padded": sys.executable}
    if arguments.peer_python:
        ways |= {name: str(arguments.peer_python) for name in ("TRL", "TRL, packed", "TRL, checkpointing")}
    results: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for turn in range(arguments.turns):
        for way, python in ways.items():
            results[way].append(run(way, python, folder, spec))
            print(f"turn {turn + 1}: {way} {json.dumps(results[way][-1])}", file=sys.stderr)
    report(results, spec)


def prepare(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Base, step-0 adapter, rows as text and as tokens; what every way gets."""
    from data_contracts.run_spec import TrainSpec
    from tasks.processes import run_worker
    from tasks.workers.chat import load_chat
    from tasks.workers.prepare_base import prepare as prepare_base

    base = Path(prepare_base({"base": "builtin:smollm2-135m", "revision": None}, folder / "base")["path"])
    dials = TrainSpec(rank=16, alpha=32).model_dump()
    run_worker("tasks.workers.init_adapter", {"base": str(base), "kind": "lora", **dials}, folder / "step0")
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
    return dials | {
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
    from tasks.processes import run_worker

    spec = {"packages": ["stdlib"], "max_lookup_rows": 300, "max_summary_rows": 150, "max_rows_per_package": 400}
    run_worker("tasks.workers.build_python_docs", spec, out)
    for line in (out / "rows.jsonl").read_text().splitlines():
        yield json.loads(line)["messages"]


def run(way: str, python: str, folder: Path, spec: dict[str, Any]) -> dict[str, float]:
    from tasks.processes import worker_environment

    out = Path(tempfile.mkdtemp(dir=folder))
    (out / "spec.json").write_text(json.dumps(spec | {"out": str(out)}))
    command = [python, "-m", "benchmarks.training", "--way", way, "--spec", str(out / "spec.json")]
    environment = worker_environment() if python == sys.executable and way.startswith("tunegate") else None
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        raise SystemExit(f"{way} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(found[0].removeprefix("RESULT ")))


# --- the ways -----------------------------------------------------------------------------------------------


def tunegate(spec: dict[str, Any], checkpointing: bool = False) -> dict[str, float]:
    """The training worker itself, with the same tokens a step on average as the others' rows."""
    import torch

    from tasks.workers.train_adapter import train

    torch.set_num_threads(spec["threads"])
    rows = len(json.loads(Path(spec["texts"]).read_text()))
    batch_tokens = round(spec["tokens"] / rows * spec["batch_rows"])
    own = {
        "base_name": "benchmark", "batch_tokens": batch_tokens, "warmup_ratio": 0.0, "max_loss_rise_nats": None,
        "activation_checkpointing": checkpointing, "checkpoint_steps": 100_000,
    }  # fmt: skip
    report = train(spec | own, Path(spec["out"]))
    seconds = [point["seconds"] for point in report["loss"]]
    # The first step's tokens are left out with its seconds: on average all steps have as many.
    share = (len(seconds) - 1) / len(seconds)
    first = report["loss"][0]["loss_nats"]
    found = outcome(report["train_tokens"] * share, sum(seconds[1:]), report["peak_rss_bytes"], first)
    return found | {"flop_per_token": flop_per_token(spec, report["completion_tokens"] / report["train_tokens"])}


def flop_per_token(spec: dict[str, Any], scored: float) -> float:
    """Multiplications and additions of the products that cannot be left out: attention and shared prefixes not counted.

    Frozen layers once forward and once for their input's gradient, adapters for their own as well, the head where a
    token is scored.
    """
    from tasks.workers.describe_base import architecture_at

    arch = architecture_at(spec["base"], None)
    adapters = arch.layers * sum(spec["rank"] * (linear.inputs + linear.outputs) for linear in arch.linears)
    return 4 * arch.linear_parameters + 6 * adapters + 4 * arch.vocab * arch.hidden * scored


def transformers_trainer(spec: dict[str, Any]) -> dict[str, float]:
    """A padded batch, the library's loss over the completion's tokens."""
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(spec["base"])
    model = PeftModel.from_pretrained(load(spec), spec["step0"], is_trainable=True)
    rows = []
    for prompt, completion in json.loads(Path(spec["texts"]).read_text()):
        ids, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, completion))
        rows.append({"input_ids": ids + answer, "labels": [-100] * len(ids) + answer})

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, Any]:
        longest = max(len(row["input_ids"]) for row in batch)
        gaps = [longest - len(row["input_ids"]) for row in batch]
        columns = {
            "input_ids": [row["input_ids"] + [0] * gap for row, gap in zip(batch, gaps, strict=True)],
            "labels": [row["labels"] + [-100] * gap for row, gap in zip(batch, gaps, strict=True)],
            "attention_mask": [[1] * (longest - gap) + [0] * gap for gap in gaps],
        }
        return {name: torch.tensor(values) for name, values in columns.items()}

    trainer = Trainer(
        model=model, args=TrainingArguments(**arguments_of(spec)), train_dataset=rows, data_collator=collate
    )
    return timed(trainer, spec)


def trl(spec: dict[str, Any], **options: Any) -> dict[str, float]:
    """SFTTrainer on prompt and completion, as its documentation shows."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    texts = json.loads(Path(spec["texts"]).read_text())
    rows = Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in texts])
    config = SFTConfig(**arguments_of(spec) | {"max_length": 1024, "gradient_checkpointing": False} | options)
    adapter = LoraConfig(r=spec["rank"], lora_alpha=spec["alpha"], target_modules="all-linear", task_type="CAUSAL_LM")
    tokenizer = AutoTokenizer.from_pretrained(spec["base"])
    trainer = SFTTrainer(
        model=load(spec), args=config, train_dataset=rows, peft_config=adapter, processing_class=tokenizer
    )
    return timed(trainer, spec)


WAYS: dict[str, Any] = {
    "tunegate": tunegate,
    "tunegate, checkpointing": lambda spec: tunegate(spec, checkpointing=True),
    "Trainer, padded": transformers_trainer,
    "TRL": trl,
    "TRL, packed": lambda spec: trl(spec, packing=True, per_device_train_batch_size=1),
    "TRL, checkpointing": lambda spec: trl(spec, gradient_checkpointing=True),
}


def load(spec: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.set_num_threads(spec["threads"])
    dtype = torch.bfloat16 if spec["precision"] == "bf16" else torch.float32
    options: dict[str, Any] = {"dtype": dtype}
    if spec["method"] == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    return AutoModelForCausalLM.from_pretrained(spec["base"], **options)


def arguments_of(spec: dict[str, Any]) -> dict[str, Any]:
    return {
        "output_dir": spec["out"], "per_device_train_batch_size": spec["batch_rows"], "num_train_epochs": 1,
        "learning_rate": spec["learning_rate"], "logging_steps": 1, "save_strategy": "no", "report_to": [],
        "use_cpu": True, "bf16": spec["precision"] == "bf16", "seed": spec["seed"], "disable_tqdm": True,
    }  # fmt: skip


def timed(trainer: Any, spec: dict[str, Any]) -> dict[str, float]:
    from transformers import TrainerCallback

    from tasks.workers.device import peak_rss_bytes

    times: list[float] = []

    class Ends(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    trainer.add_callback(Ends())
    trainer.train()
    steps = len(times)
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return outcome(spec["tokens"] * (steps - 1) / steps, times[-1] - times[0], peak_rss_bytes(), first)


def outcome(tokens: float, seconds: float, peak: int, first_loss: float) -> dict[str, float]:
    speed = gemm_gflops()
    return {"tokens_per_s": tokens / seconds, "peak_bytes": peak, "first_loss": first_loss, "gemm_gflops": speed}


def gemm_gflops() -> float:
    """What this machine gives for one large product in fp32, now."""
    import torch

    a, b = torch.randn(GEMM, GEMM), torch.randn(GEMM, GEMM)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - started)
    return 2 * GEMM**3 / min(seconds) / 1e9


# --- what is told -------------------------------------------------------------------------------------------


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
