"""Train one arm from the step-0 adapter: `python -m tasks.workers.train_adapter spec.json out/`.

spec: method, base, step0 (folders), train, validation (JSONL of rows), model.precision and the dials of
data_contracts.run_spec.TrainSpec. Killed and started again with the same out/, it goes on from its last checkpoint.
Writes out/adapter/ and out/report.json; out/rows_too_long.jsonl names the rows that were left out, truncated or split.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, TrainerState

from data_contracts.errors import DataError, Problem
from tasks.core.packing import Scored, group_for_packing, pack, plan_batches
from tasks.core.too_long import TooLong, fit
from tasks.workers.bases import load_base, weights_bytes
from tasks.workers.chat import Chat, load_chat
from tasks.workers.device import Device, choose_device, peak_rss_bytes, reset_peak_rss
from tasks.workers.fused_lora import fuse_lora
from tasks.workers.harness import main, say
from tasks.workers.planned import predicted_train_bytes
from tasks.workers.scoring import Batch, Way, choose_way, scored_losses, to_device, to_tensors

_CHECKED_ROWS = 64  # decoded before training starts
_COMPARED_ROWS = 4  # scored both ways before training starts


def train(spec: dict[str, Any], out: Path) -> dict[str, Any]:
    started = time.monotonic()
    device = choose_device(spec["precision"], spec["threads"])
    say("device", **vars(device))
    chat = load_chat(Path(spec["base"]))
    rows = encode_rows(chat, Path(spec["train"]), spec["max_tokens"], spec["too_long"], out / "rows_too_long.jsonl")
    lengths = [len(row.ids) for row in rows]
    plan = plan_batches(lengths, spec["batch_tokens"], spec["epochs"], spec["seed"])[: spec["max_steps"]]

    base = load_base(Path(spec["base"]), spec["method"], device)
    set_seed(spec["seed"])
    model = PeftModel.from_pretrained(base, spec["step0"], is_trainable=True)
    if spec["activation_checkpointing"]:
        model.enable_input_require_grads()
    load_peak = reset_peak_rss()
    scoring = choose_way(model, rows[:_COMPARED_ROWS])
    say("note", text=f"{scoring.way} forward: {scoring.reason}")
    fuse_lora(model)
    trainer = PackedTrainer(model, rows, plan, scoring.way, training_arguments(spec, out, device, len(plan)))
    checkpoint = last_checkpoint(out)
    trainer.train(resume_from_checkpoint=checkpoint)
    memory = {"peak_train_bytes": peak_train_bytes(device), "peak_rss_bytes": max(load_peak, peak_rss_bytes())}
    save_adapter(model, out / "adapter", spec["base_name"])
    return {
        "method": spec["method"],
        "resumed_from_step": int(checkpoint.rpartition("-")[2]) if checkpoint else 0,
        **count_work(rows, plan),
        "rows_too_long": len((out / "rows_too_long.jsonl").read_text().splitlines()),
        "too_long": {"leave_out": "left out", "truncate": "truncated", "split": "split"}[spec["too_long"]],
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "weights_bytes": weights_bytes(model),
        **memory,
        "predicted_train_bytes": predicted_train_bytes(spec, rows, plan, device, scoring.way),
        **told(trainer.state),
        "final_validation_nll_nats": validation_loss(model, chat, spec, device, scoring.way),
        "seconds": time.monotonic() - started,
        **vars(device),
        "scoring": scoring.way,
        "scoring_reason": scoring.reason,
    }


def peak_train_bytes(device: Device) -> int:
    """Device memory on CUDA, the process's resident memory on a CPU."""
    return torch.cuda.max_memory_allocated() if device.device == "cuda" else peak_rss_bytes()


def told(state: TrainerState) -> dict[str, Any]:
    """What Trainer's log says, steps before a resume included."""
    history = [entry for entry in state.log_history if "loss" in entry]
    return {
        "steps": state.global_step,
        "train_seconds": sum(entry["step_seconds"] for entry in history),
        "loss": [loss_point(entry) for entry in history],
    }


def count_work(rows: list[Scored], plan: list[list[int]]) -> dict[str, int]:
    """Rows and tokens that the plan's steps train on; a row counts its tokens once an epoch."""
    trained = [rows[index] for batch in plan for index in batch]
    return {
        "train_rows": len({index for batch in plan for index in batch}),
        "train_tokens": sum(len(row.ids) for row in trained),
        "completion_tokens": sum(len(row.ids) - row.start for row in trained),
    }


def save_adapter(model: Any, folder: Path, base_name: str) -> None:
    """safetensors and configuration, without a path of this machine and without PEFT's empty README."""
    model.peft_config["default"].base_model_name_or_path = base_name
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)


def encode_rows(chat: Chat, file: Path, max_tokens: int, too_long: TooLong, listed: Path) -> list[Scored]:
    """Rows as token ids; those over `max_tokens` are listed in `listed`, with what became of them."""
    rows: list[Scored] = []
    whole: list[Scored] = []
    with file.open() as lines, listed.open("w") as long_rows:
        for line in lines:
            row = json.loads(line)
            scored = chat.scored(row["messages"])
            sequences = fit(scored, max_tokens, too_long)
            rows += sequences
            if sequences == [scored]:
                whole.append(scored)
                continue
            named = {key: row[key] for key in ("row_id", "source", "line")}
            told = {"tokens": len(scored.ids), "limit": max_tokens, "policy": too_long, "sequences": len(sequences)}
            long_rows.write(json.dumps({**named, **told}) + "\n")
    if not rows:
        act = "raise train.max_tokens, or set train.too_long to truncate or split"
        raise DataError(Problem("no row is short enough to train on", file.name, f"{max_tokens} tokens", act))
    check_batch(chat, whole[:_CHECKED_ROWS])
    return rows


def check_batch(chat: Chat, rows: list[Scored]) -> None:
    """Decode rows as the model will see them: an answer whose stop token is not learned never ends."""
    for row in rows:
        text = str(chat.tokenizer.decode(pack([row]).targets_N.tolist()))
        if not text.endswith(chat.stops):
            raise DataError(Problem(f"a completion ends without a stop token: ...{text[-20:]!r}", "first rows",
                                    f"one of {list(chat.stops)}", "check the base's chat template"))  # fmt: skip


def training_arguments(spec: dict[str, Any], out: Path, device: Device, steps: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        learning_rate=spec["learning_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=round(spec["warmup_ratio"] * steps),
        weight_decay=spec["weight_decay"],
        max_grad_norm=spec["max_grad_norm"],
        optim=spec["optimizer"],
        gradient_checkpointing=spec["activation_checkpointing"],
        gradient_checkpointing_kwargs={"use_reentrant": False} if spec["activation_checkpointing"] else None,
        bf16=device.precision == "bf16",
        use_cpu=device.device == "cpu",
        seed=spec["seed"],
        save_steps=spec["checkpoint_steps"],
        save_total_limit=2,  # the newest may be half-written when a machine dies
        logging_steps=1,
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,
    )


class PackedTrainer(Trainer):
    """transformers.Trainer fed with packed rows, its loss taken over completion tokens only."""

    def __init__(
        self, model: Any, rows: list[Scored], plan: list[list[int]], way: Way, args: TrainingArguments
    ) -> None:
        super().__init__(model=model, args=args, train_dataset=rows, callbacks=[Clock()])
        self.remove_callback(PrinterCallback)
        self.rows: Any = rows
        self.plan, self.way = plan, way
        self.model_accepts_loss_kwargs = True

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """One pass over the plan: it holds all epochs, so a resumed run skips to where it was."""
        loader: DataLoader[Batch] = DataLoader(
            self.rows, batch_sampler=self.plan, collate_fn=lambda rows: to_tensors(rows, self.way)
        )
        prepared: DataLoader[Batch] = self.accelerator.prepare(loader)
        return prepared

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Mean loss per completion token of the optimiser step, in nats."""
        losses = scored_losses(model, inputs)
        return losses.sum() / (len(losses) if num_items_in_batch is None else num_items_in_batch)


class Clock(TrainerCallback):
    """Adds each step's seconds to Trainer's log, which its checkpoints keep, and tells the parent."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        say("start", step=state.global_step, of=state.max_steps)
        self.last = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        now = time.monotonic()
        state.log_history[-1]["step_seconds"] = now - self.last
        self.last = now
        say("step", step=state.global_step, of=state.max_steps, loss_nats=logs["loss"])


def last_checkpoint(out: Path) -> str | None:
    """The newest complete checkpoint; Trainer writes the state file last, so one without it is a torn one."""
    complete = [folder for folder in out.glob("checkpoint-*") if (folder / "trainer_state.json").exists()]
    newest = max(complete, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)
    return str(newest) if newest else None


def loss_point(entry: dict[str, float]) -> dict[str, float]:
    return {
        "step": entry["step"],
        "loss_nats": entry["loss"],
        "learning_rate": entry["learning_rate"],
        "seconds": entry["step_seconds"],
    }


def validation_loss(model: Any, chat: Chat, spec: dict[str, Any], device: Device, way: Way) -> float | None:
    """Mean loss per completion token of the validation rows after training; None without such rows."""
    lines = Path(spec["validation"]).read_text().splitlines()
    rows = [chat.scored(json.loads(line)["messages"]) for line in lines]
    rows = [row for row in rows if len(row.ids) <= spec["max_tokens"]]
    if not rows:
        return None
    model.eval()
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for group in group_for_packing(rows, spec["batch_tokens"]):
            losses = scored_losses(model, to_device(to_tensors([rows[i] for i in group], way), device.device))
            total, tokens = total + float(losses.sum()), tokens + len(losses)
    return total / tokens


if __name__ == "__main__":
    main(train)
