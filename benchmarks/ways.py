"""One training run each: Tunegate's worker, a plain transformers Trainer, TRL's SFTTrainer, LLaMA-Factory.

Run by `benchmarks.training`, each in a process of its own: `python -m benchmarks.ways NAME spec.json`.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

GEMM = 2048  # rows and columns of the product that measures the machine


def tunegate(spec: dict[str, Any], checkpointing: bool = False) -> dict[str, float]:
    """The training worker itself: `batch_tokens` a step, or on average as many as the others' rows have."""
    import torch

    from data_contracts.jobs.training import TrainJob
    from data_contracts.train_spec import TrainSpec
    from tasks.training.workers.train_adapter import train

    torch.set_num_threads(spec["threads"])
    rows = len(json.loads(Path(spec["texts"]).read_text()))
    batch_tokens = spec.get("batch_tokens_a_step") or round(spec["tokens"] / rows * spec["batch_rows"])
    settings = TrainSpec(
        rank=spec["rank"], alpha=spec["alpha"], learning_rate=spec["learning_rate"], batch_tokens=batch_tokens,
        warmup_ratio=0.0, max_loss_rise_nats=None, activation_checkpointing=checkpointing, checkpoint_steps=100_000,
        threads=spec["threads"],
    )  # fmt: skip
    job = TrainJob(
        method=spec["method"], seed=spec["seed"], base=spec["base"], base_name="benchmark", step0=spec["step0"],
        train=spec["train"], validation=spec["validation"], precision=spec["precision"], threads_reason=None,
        settings=settings,
    )  # fmt: skip
    report = train(job, Path(spec["out"]))
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
    from tasks.training.workers.describe_base import architecture_at

    arch = architecture_at(spec["base"], None)
    adapters = arch.layers * sum(spec["rank"] * (linear.inputs + linear.outputs) for linear in arch.linears)
    return 4 * arch.linear_parameters + 6 * adapters + 4 * arch.vocab * arch.hidden * scored


def transformers_trainer(spec: dict[str, Any]) -> dict[str, float]:
    """A padded batch, the library's loss over the completion's tokens."""
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(spec["base"])
    model = PeftModel.from_pretrained(load_peer_base(spec), spec["step0"], is_trainable=True)
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

    clock = clock_callback()
    settings = TrainingArguments(**arguments_of(spec))
    Trainer(model=model, args=settings, train_dataset=rows, data_collator=collate, callbacks=[clock]).train()
    return clock.outcome(spec)


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
    clock = clock_callback()
    SFTTrainer(
        model=load_peer_base(spec), args=config, train_dataset=rows, peft_config=adapter, processing_class=tokenizer,
        callbacks=[clock],
    ).train()  # fmt: skip
    return clock.outcome(spec)


def llama_factory(spec: dict[str, Any], **options: Any) -> dict[str, float]:
    """LLaMA-Factory's own training call; its `empty` template passes the ready-made texts on as they are."""
    import torch
    from llamafactory.train.tuner import run_exp

    torch.set_num_threads(spec["threads"])
    folder = Path(spec["out"])
    texts = json.loads(Path(spec["texts"]).read_text())
    rows = [{"instruction": prompt, "input": "", "output": completion} for prompt, completion in texts]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    quantised = {"quantization_bit": 4, "double_quantization": True} if spec["method"] == "qlora" else {}
    clock = clock_callback()
    settings = {
        "model_name_or_path": spec["base"], "stage": "sft", "do_train": True, "finetuning_type": "lora",
        "lora_rank": spec["rank"], "lora_alpha": spec["alpha"], "lora_target": "all", "template": "empty",
        "dataset_dir": str(folder), "dataset": "rows", "cutoff_len": 1024, "disable_gradient_checkpointing": True,
        "report_to": "none",
    }  # fmt: skip
    run_exp(arguments_of(spec) | settings | quantised | options, callbacks=[clock])
    return clock.outcome(spec)


WAYS: dict[str, Any] = {
    "tunegate": tunegate,
    "tunegate, checkpointing": lambda spec: tunegate(spec, checkpointing=True),
    "Trainer, padded": transformers_trainer,
    "TRL": trl,
    "TRL, packed": lambda spec: trl(spec, packing=True, per_device_train_batch_size=1),
    "TRL, checkpointing": lambda spec: trl(spec, gradient_checkpointing=True),
    "LLaMA-Factory": llama_factory,
    "LLaMA-Factory, packed": lambda spec: llama_factory(spec, packing=True, per_device_train_batch_size=1),
    "LLaMA-Factory, checkpointing": lambda spec: llama_factory(spec, disable_gradient_checkpointing=False),
}


def load_peer_base(spec: dict[str, Any]) -> Any:
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


def clock_callback() -> Any:
    """A Trainer callback that notes when each step ended and the first loss that was logged."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []
            self.losses: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            self.losses += [logs["loss"]] if "loss" in logs else []

        def outcome(self, spec: dict[str, Any]) -> dict[str, float]:
            steps = len(self.ends)
            tokens = spec["tokens"] * (steps - 1) / steps
            return outcome(tokens, self.ends[-1] - self.ends[0], peak_rss_bytes(), self.losses[0])

    return Clock()


def peak_rss_bytes() -> int:
    """As the worker measures it, without importing from it: the peers' environments lack its libraries."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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


if __name__ == "__main__":
    print("RESULT " + json.dumps(WAYS[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))))
