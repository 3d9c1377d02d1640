"""The memory claim where weights dominate: LoRA against QLoRA on a random Llama of 1.1 billion parameters.

Each run trains in a process of its own, one row of at most 128 tokens a step, activation checkpointing on, and reports
the highest resident memory while it loads and while it trains. Articles claim 59 % less (their source: facts in docs).

    python -m benchmarks.memory [--threads 2] [--steps 3]
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from data_contracts.jobs.models import InitAdapterJob
from data_contracts.jobs.training import TrainJob
from data_contracts.train_spec import Method, TrainSpec
from tasks.models.base import start_settings
from tasks.runtime.processes import Launch, run_worker

RUNS: dict[str, tuple[Method, str]] = {
    "LoRA, fp32": ("lora", "fp32"),
    "LoRA, bf16": ("lora", "bf16"),
    "QLoRA, fp32 arithmetic": ("qlora", "fp32"),
    "QLoRA, bf16 arithmetic": ("qlora", "bf16"),
}
SHAPE = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4, "max_position_embeddings": 2048,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bases = {precision: random_llama(folder, precision) for precision in ("fp32", "bf16")}
        rows = short_rows(folder / "rows.jsonl")
        found = {}
        for name, (method, precision) in RUNS.items():
            # QLoRA quantises 16-bit weights, whatever it computes in: that is what hubs have.
            base = bases["bf16" if method == "qlora" else precision]
            found[name] = train(folder / name.replace(" ", "-"), base, method, precision, rows, arguments)
    report(found)


def random_llama(folder: Path, precision: str) -> Path:
    """Written once as safetensors, with the tokenizer of the default base."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from data_contracts.jobs.models import PrepareBaseJob
    from tasks.models.workers.prepare_base import prepare

    small = Path(prepare(PrepareBaseJob(base="builtin:smollm2-135m", revision=None), folder / "small")["path"])
    tokenizer = AutoTokenizer.from_pretrained(small)
    out = folder / f"llama-{precision}"
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **SHAPE)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def short_rows(file: Path) -> Path:
    question = "Which way does the river flow after the long rain of spring? " * 5
    with file.open("w") as out:
        for i in range(16):
            messages = [
                {"role": "user", "content": f"{i}. {question}"},
                {"role": "assistant", "content": "South. " * 12},
            ]
            out.write(json.dumps({"row_id": str(i), "source": "benchmark", "line": i, "messages": messages}) + "\n")
    return file


def train(out: Path, base: Path, method: Method, precision: str, rows: Path, arguments: argparse.Namespace) -> Any:
    settings = TrainSpec(
        methods=[method], rank=16, alpha=32, threads=arguments.threads, max_tokens=128, too_long="truncate",
        batch_tokens=128, max_steps=arguments.steps, learning_rate=1e-4, warmup_ratio=0.0, activation_checkpointing=True,
        checkpoint_steps=1000,
    )  # fmt: skip
    start = start_settings(method, 17, settings, precision)
    assert start
    run_worker("tasks.models.workers.init_adapter", InitAdapterJob(base=base, settings=start), out / "step0")
    job = TrainJob(
        method=method, seed=17, base=base, base_name="random", step0=out / "step0" / "adapter", train=rows,
        validation=Path("/dev/null"), precision=precision, threads_reason=None, settings=settings,
    )  # fmt: skip
    return run_worker("tasks.training.workers.train_adapter", job, out / "train", Launch(f"train {out.name}"))


def report(found: dict[str, Any]) -> None:
    print(
        f"{'run':<26}{'peak GB':>9}{'training GB':>13}{'weights GB':>12}{'s/step':>8}{'below fp32':>12}{'below bf16':>12}"
    )
    peaks = {name: report["peak_rss_bytes"] for name, report in found.items()}
    for name, run in found.items():
        fp32, bf16 = (1 - peaks[name] / peaks[other] for other in ("LoRA, fp32", "LoRA, bf16"))
        sizes = [run[key] / 1e9 for key in ("peak_rss_bytes", "peak_train_bytes", "weights_bytes")]
        seconds = run["loss"][-1]["seconds"]
        print(f"{name:<26}{sizes[0]:>9.2f}{sizes[1]:>13.2f}{sizes[2]:>12.2f}{seconds:>8.1f}{fp32:>12.1%}{bf16:>12.1%}")


if __name__ == "__main__":
    main()
