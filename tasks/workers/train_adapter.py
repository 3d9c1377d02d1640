"""Train one arm from the step-0 adapter: `python -m tasks.workers.train_adapter spec.json out/`.

spec: method, base, step0 (folders), train, validation (JSONL of rows), model.precision and the dials of
data_contracts.run_spec.TrainSpec. Killed and started again with the same out/, it goes on from its last checkpoint.
Writes out/adapter/ and out/report.json; out/rows_too_long.jsonl names the rows that were left out, truncated or split.
"""

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import TrainerState

from data_contracts.errors import ConfigError, DataError, Problem
from tasks.core.packing import Scored, pack, plan_batches
from tasks.core.too_long import TooLong, fit
from tasks.workers.bases import load_base, weights_bytes
from tasks.workers.chat import Chat, load_chat
from tasks.workers.checkpoints import last_checkpoint, state_of, step_of
from tasks.workers.device import Device, choose_device, peak_rss_bytes, reset_peak_rss
from tasks.workers.fused_lora import fuse_lora
from tasks.workers.harness import is_first_rank, main, say
from tasks.workers.packed_trainer import PackedTrainer, Work, mean_loss, training_arguments
from tasks.workers.planned import predicted_train_bytes
from tasks.workers.ranks import first_says, joined, largest, rank, ranks
from tasks.workers.scoring import Scoring, choose_way
from tasks.workers.shards import is_sharded, load_weights, whole_weights
from tasks.workers.watch import Clock, KeepBest, LossWatch, StopOnSignal, stopped_early

_CHECKED_ROWS = 64  # decoded before training starts


def train(spec: dict[str, Any], out: Path) -> dict[str, Any]:
    with joined():
        return train_rank(spec, out)


def train_rank(spec: dict[str, Any], out: Path) -> dict[str, Any]:
    """The whole work, or this rank's part of it; what is answered is the same on all ranks but for times."""
    started = time.monotonic()
    device = choose_device(spec["precision"], spec["threads"])
    say("device", **vars(device))
    chat = load_chat(Path(spec["base"]))
    listed = out / "rows_too_long.jsonl" if is_first_rank() else Path(os.devnull)
    rows, row_ids = encode_rows(chat, Path(spec["train"]), spec["max_tokens"], spec["too_long"], listed)
    lengths = [len(row.ids) for row in rows]
    plan = plan_batches(lengths, spec["batch_tokens"], spec["epochs"], spec["seed"])[: spec["max_steps"]]
    validation = validation_rows(chat, spec)

    model = adapted_base(spec, device)
    load_peak = reset_peak_rss()
    scoring = scoring_way(model, rows, sharding(spec))
    fuse_lora(model)
    work = Work(rows, row_ids, plan, validation, spec["batch_tokens"], scoring.way)
    checkpoint = agreed_checkpoint(out)
    size = sizes(model)
    state = run_trainer(model, work, spec, out, device, checkpoint)
    peaks = map(int, largest([peak_train_bytes(device), max(load_peak, peak_rss_bytes())]))
    save_adapter(model, out / "adapter", spec["base_name"])
    return {
        "method": spec["method"],
        "resumed_from_step": step_of(checkpoint),
        **count_work(rows, plan[: state.global_step]),
        "rows_too_long": len(listed.read_text().splitlines()),
        "too_long": {"leave_out": "left out", "truncate": "truncated", "split": "split"}[spec["too_long"]],
        **size,
        **dict(zip(("peak_train_bytes", "peak_rss_bytes"), peaks, strict=True)),
        "predicted_train_bytes": predicted(spec, work, device),
        **told(state),
        "final_validation_nll_nats": mean_loss(model, work) if validation else None,
        "seconds": time.monotonic() - started,
        "workers": ranks(),
        **vars(device),
        "scoring": scoring.way,
        "scoring_reason": scoring.reason,
    }


def scoring_way(model: Any, rows: list[Scored], sharding: str) -> Scoring:
    """How losses are computed. Raises ConfigError where that way cannot have its weights divided."""
    scoring = choose_way(model, rows, max(len(row.ids) for row in rows))
    if sharding != "none" and scoring.way != "packed":
        raise ConfigError(Problem(f"rows are trained padded ({scoring.reason})", "train.sharding", "none"))
    say("note", text=f"{scoring.way} forward: {scoring.reason}")
    return scoring


def sizes(model: Any) -> dict[str, int]:
    """Of the whole model: asked before its weights are divided."""
    return {
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "weights_bytes": weights_bytes(model),
    }


def agreed_checkpoint(out: Path) -> Path | None:
    """The newest complete checkpoint, as rank 0 finds it."""
    step = first_says(step_of(last_checkpoint(out)) if is_first_rank() else 0)
    return out / f"checkpoint-{step}" if step else None


def sharding(spec: dict[str, Any]) -> str:
    return str(spec.get("sharding", "none"))


def adapted_base(spec: dict[str, Any], device: Device) -> PeftModel:
    """The base with the step-0 adapter on it, ready to train."""
    if sharding(spec) == "none":
        base = load_base(Path(spec["base"]), spec["method"], device)
    else:  # a device may hold its part only
        base = load_base(Path(spec["base"]), spec["method"], replace(device, device="cpu"), device.dtype)
    set_seed(spec["seed"])
    model = PeftModel.from_pretrained(base, spec["step0"], is_trainable=True)
    if spec["activation_checkpointing"]:
        model.enable_input_require_grads()
    return model


def run_trainer(
    model: Any, work: Work, spec: dict[str, Any], out: Path, device: Device, checkpoint: Path | None
) -> TrainerState:
    """Train from the checkpoint on; `model` ends as the last step left it, or the best validation if there are any."""
    before = state_of(checkpoint)
    stop = StopOnSignal()
    callbacks: list[TrainerCallback] = [LossWatch(work, out, spec["max_loss_rise_nats"]), Clock(), stop]
    if spec["validation_steps"] is not None:
        callbacks.append(KeepBest(spec["early_stopping_patience"]))
    split = before["log_history"][-1].get("micro_batches", 1) if before else 1
    arguments = training_arguments(spec, out, device, len(work.plan))
    trainer = PackedTrainer(model, work, arguments, callbacks, split, sharding(spec))
    if not is_first_rank():
        set_seed(spec["seed"] + rank())  # no two ranks drop the same units
    if checkpoint and stopped_early(before):
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    else:
        with stop.listening():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.state.best_global_step:
        load_adapter(model, out / f"checkpoint-{trainer.state.best_global_step}")
    return trainer.state


def validation_rows(chat: Chat, spec: dict[str, Any]) -> list[Scored]:
    """The validation split's rows that are short enough. Raises DataError if validation was asked for and has none."""
    lines = Path(spec["validation"]).read_text().splitlines()
    rows = [chat.scored(json.loads(line)["messages"]) for line in lines]
    rows = [row for row in rows if len(row.ids) <= spec["max_tokens"]]
    if not rows and spec["validation_steps"] is not None:
        act = "raise curate.validation_fraction, or set train.validation_steps to null"
        raise DataError(Problem("there is no validation row to measure", Path(spec["validation"]).name, act=act))
    return rows


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
        "micro_batches": history[-1]["micro_batches"],
        "validation": [
            {"step": entry["step"], "nll_nats": entry["eval_loss"]}
            for entry in state.log_history
            if "eval_loss" in entry
        ],
        "best_step": state.best_global_step or None,
        "stopped_early": stopped_early(vars(state)),
    }


def count_work(rows: list[Scored], plan: list[list[int]]) -> dict[str, int]:
    """Rows and tokens that the plan's steps train on; a row counts its tokens once an epoch."""
    trained = [rows[index] for batch in plan for index in batch]
    return {
        "train_rows": len({index for batch in plan for index in batch}),
        "train_tokens": sum(len(row.ids) for row in trained),
        "completion_tokens": sum(len(row.ids) - row.start for row in trained),
    }


def predicted(spec: dict[str, Any], work: Work, device: Device) -> int | None:
    """For one process; None where weights are divided, which has no formulas."""
    if sharding(spec) != "none":
        return None
    return predicted_train_bytes(spec, work.sequences, work.largest_shares(), device, work.way)


def load_adapter(model: Any, folder: Path) -> None:
    if is_sharded(model):
        load_weights(model, folder)
    else:
        model.load_adapter(str(folder), "default", is_trainable=True)


def save_adapter(model: Any, folder: Path, base_name: str) -> None:
    """safetensors and configuration, without a path of this machine and without PEFT's empty README."""
    weights = whole_weights(model) if is_sharded(model) else None
    if not is_first_rank():
        return
    model.peft_config["default"].base_model_name_or_path = base_name
    model.save_pretrained(str(folder), state_dict=weights)
    (folder / "README.md").unlink(missing_ok=True)


def encode_rows(
    chat: Chat, file: Path, max_tokens: int, too_long: TooLong, listed: Path
) -> tuple[list[Scored], list[str]]:
    """Rows as token ids, and the row id of each; those over `max_tokens` are listed in `listed`, with their fate."""
    rows: list[Scored] = []
    row_ids: list[str] = []
    whole: list[Scored] = []
    with file.open() as lines, listed.open("w") as long_rows:
        for line in lines:
            row = json.loads(line)
            scored = chat.scored(row["messages"])
            sequences = fit(scored, max_tokens, too_long)
            rows += sequences
            row_ids += [row["row_id"]] * len(sequences)
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
    return rows, row_ids


def check_batch(chat: Chat, rows: list[Scored]) -> None:
    """Decode rows as the model will see them: an answer whose stop token is not learned never ends."""
    for row in rows:
        text = str(chat.tokenizer.decode(pack([row]).targets_N.tolist()))
        if not text.endswith(chat.stops):
            raise DataError(Problem(f"a completion ends without a stop token: ...{text[-20:]!r}", "first rows",
                                    f"one of {list(chat.stops)}", "check the base's chat template"))  # fmt: skip


def loss_point(entry: dict[str, float]) -> dict[str, float]:
    return {
        "step": entry["step"],
        "loss_nats": entry["loss"],
        "learning_rate": entry["learning_rate"],
        "seconds": entry["step_seconds"],
    }


WORK = train

if __name__ == "__main__":
    record(main)(WORK)  # torchrun is told by it what a rank broke on
