"""Train one arm from its start: `python -m tasks.training.workers.train_adapter spec.json out/`.

spec: method, base, step0 (folders; step0 is null for the method full, which starts from the base), train, validation (JSONL of rows), model.precision and the settings of
data_contracts.train_spec.TrainSpec. Killed and started again with the same out/, it goes on from its last checkpoint.
Writes out/adapter/ (with all weights, if the method is full) and out/report.json; out/rows_too_long.jsonl names the rows that were left out, truncated or split.
"""

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftConfig, get_peft_model
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import TrainerState

from data_contracts.errors import ConfigError, DataError, Problem
from data_contracts.train_spec import LORA_ARMS
from tasks.models.core.packing import Scored, plan_batches
from tasks.models.workers.chat_template import Chat, load_chat
from tasks.models.workers.fused_layers import fuse_lora, fuse_mlp, fuse_norms
from tasks.models.workers.loading import adapters_bytes, checked_adapter, load_base, save_adapter, weights_bytes
from tasks.models.workers.lora_init import TAKEN_OFF, as_plain_lora, take_off_start
from tasks.models.workers.scoring import Scoring, choose_way
from tasks.runtime.workers.device import Device, bytes_now, choose_device, peak_bytes, peak_rss_bytes, reset_peak_rss
from tasks.runtime.workers.harness import is_first_rank, main, say
from tasks.runtime.workers.ranks import first_says, joined, largest, rank, ranks
from tasks.training.workers.callbacks import Clock, KeepBest, LossWatch, StepBytes, StopOnSignal, stopped_early
from tasks.training.workers.checkpoints import last_checkpoint, state_of, step_of
from tasks.training.workers.fsdp import is_sharded, whole_weights
from tasks.training.workers.neftune import add_noise
from tasks.training.workers.planned_memory import planned_memory
from tasks.training.workers.trainer import PackedTrainer, Work, mean_loss, training_arguments
from tasks.training.workers.training_rows import encode_rows


def train(spec: dict[str, Any], out: Path) -> dict[str, Any]:
    with joined():
        return train_rank(spec, out)


def train_rank(spec: dict[str, Any], out: Path) -> dict[str, Any]:
    """The whole work, or this rank's part of it; what is answered is the same on all ranks but for times."""
    started = time.monotonic()
    device = choose_device(spec["precision"], spec["threads"], spec.get("threads_reason"))
    say("device", **vars(device))
    chat = load_chat(Path(spec["base"]))
    listed = out / "rows_too_long.jsonl" if is_first_rank() else Path(os.devnull)
    rows, row_ids = encode_rows(chat, Path(spec["train"]), spec["max_tokens"], spec["too_long"], listed)
    plan = planned(rows, spec)
    say("note", text=": ".join(["batch", *batch_told(rows, plan, spec).values()]))
    validation = validation_rows(chat, spec)
    before = bytes_now(device)
    model = trainable(spec, device)
    load_peak = reset_peak_rss()
    scoring = fastest_way(model, rows, spec)
    work = Work(rows, row_ids, plan, validation, spec["batch_tokens"], scoring.way)
    checkpoint = agreed_checkpoint(out)
    size = size_of(model)
    held = {"process": before, "weights": size["weights_bytes"], "adapters": adapters_bytes(model)}
    state = run_trainer(model, work, spec, out, device, checkpoint)
    trained, took = told(state), memory(spec, work, device, state, held, load_peak)
    save(model, spec, out / "adapter")
    return {
        "method": spec["method"],
        "quantisation": quantisation_of(spec),
        "resumed_from_step": step_of(checkpoint),
        **count_work(rows, plan[: state.global_step]),
        "rows_too_long": len(listed.read_text().splitlines()),
        "too_long": {"leave_out": "left out", "truncate": "truncated", "split": "split"}[spec["too_long"]],
        **size,
        **took,
        **trained,
        "final_validation_nll_nats": mean_loss(model, work) if validation else None,
        "seconds": time.monotonic() - started,
        "workers": ranks(),
        **vars(device),
        **batch_told(rows, plan, spec, trained["micro_batches"]),
        "scoring": scoring.way,
        "scoring_reason": scoring.reason,
    }


def planned(rows: list[Scored], spec: dict[str, Any]) -> list[list[int]]:
    """The rows of each optimiser step, for all epochs."""
    lengths = [len(row.ids) for row in rows]
    return plan_batches(lengths, spec["batch_tokens"], spec["epochs"], spec["seed"])[: spec["max_steps"]]


def batch_told(rows: list[Scored], plan: list[list[int]], spec: dict[str, Any], parts: int = 1) -> dict[str, str]:
    """What a step holds, and why so much. parts: those that it was computed in at the end."""
    tokens = [sum(len(rows[index].ids) for index in step) for step in plan]
    most = f"at most {max(map(len, plan))} and {max(tokens):,}"
    steps = "train.max_steps" if len(plan) == spec["max_steps"] else f"train.epochs={spec['epochs']}"
    why = f"train.batch_tokens={spec['batch_tokens']} holds no more; {len(plan)} steps by {steps}"
    why += f"; shared by {ranks()} workers" if ranks() > 1 else ""
    why += f"; computed in {parts} parts, since memory ran out" if parts > 1 else ""
    batch = f"{sum(map(len, plan)) / len(plan):.1f} rows and {sum(tokens) / len(plan):,.0f} tokens a step ({most})"
    return {"batch": batch, "batch_reason": why}


def fastest_way(model: Any, rows: list[Scored], spec: dict[str, Any]) -> Scoring:
    """How losses are computed, said aloud; the model's layers are made ready for it."""
    scoring = choose_way(model, rows, max(len(row.ids) for row in rows))
    if sharding(spec) != "none" and scoring.way != "packed":
        raise ConfigError(Problem(f"rows are trained padded ({scoring.reason})", "train.sharding", "none"))
    say("note", text=f"{scoring.way} forward: {scoring.reason}")
    fuse_lora(model)
    fuse_mlp(model)
    fuse_norms(model)
    return scoring


def agreed_checkpoint(out: Path) -> Path | None:
    """The newest complete checkpoint, as rank 0 finds it."""
    step = first_says(step_of(last_checkpoint(out)) if is_first_rank() else 0)
    return out / f"checkpoint-{step}" if step else None


def sharding(spec: dict[str, Any]) -> str:
    return str(spec.get("sharding", "none"))


def trainable(spec: dict[str, Any], device: Device) -> Any:
    """The base with the step-0 adapter on it, or with all its weights free: ready to train."""
    is_full, base = spec["method"] == "full", Path(spec["base"])
    if sharding(spec) == "none":
        model: Any = load_base(base, spec["method"], device, spec, trains_all=is_full)
    else:  # a device may hold its part only
        model = load_base(base, spec["method"], replace(device, device="cpu"), spec, storage=device.dtype)
    set_seed(spec["seed"])
    if not is_full:
        model = with_adapter(model, spec["step0"])
    model.eval()  # PEFT's dropout begins at work, and would make the packed losses differ from the padded ones
    if is_taken_off(spec):
        take_off_start(model)
    if spec["activation_checkpointing"]:
        model.enable_input_require_grads()
    if spec["neftune_alpha"] is not None:
        add_noise(model, spec["neftune_alpha"])
    return model


def with_adapter(base: Any, folder: str) -> Any:
    """The adapter in `folder`, trainable. PeftModel.from_pretrained does the same, but for a prefix it refuses to."""
    config = PeftConfig.from_pretrained(checked_adapter(folder, base))
    config.inference_mode = False
    model = get_peft_model(base, config)
    model.load_adapter(folder, "default", is_trainable=True)
    return model


def is_taken_off(spec: dict[str, Any]) -> bool:
    return spec["method"] in LORA_ARMS and spec["init"] in TAKEN_OFF


def quantisation_of(spec: dict[str, Any]) -> dict[str, Any] | None:
    return {name: spec[name] for name in ("quant_type", "double_quant")} if spec["method"] == "qlora" else None


def run_trainer(
    model: Any, work: Work, spec: dict[str, Any], out: Path, device: Device, checkpoint: Path | None
) -> TrainerState:
    """Train from the checkpoint on; `model` ends as the last step left it, or the best validation if there are any."""
    before = state_of(checkpoint)
    stop = StopOnSignal()
    callbacks: list[TrainerCallback] = [LossWatch(work, out, spec["max_loss_rise_nats"]), Clock(), stop]
    if sharding(spec) == "none":
        callbacks.append(StepBytes())
    if spec["validation_steps"] is not None:
        callbacks.append(KeepBest(spec["early_stopping_patience"]))
    split = before["log_history"][-1].get("micro_batches", 1) if before else 1
    ratio = spec["lora_plus_ratio"] if spec["method"] in LORA_ARMS else None
    arguments = training_arguments(spec, out, device, len(work.plan))
    trainer = PackedTrainer(model, work, arguments, callbacks, split, ratio, sharding(spec))
    if not is_first_rank():
        set_seed(spec["seed"] + rank())  # no two ranks drop the same units
    if checkpoint and stopped_early(before):
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    else:
        with stop.listening():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.state.best_global_step:
        trainer.load(out / f"checkpoint-{trainer.state.best_global_step}")
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


def size_of(model: Any) -> dict[str, int]:
    """Before weights are divided among ranks."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {"trainable_parameters": trainable, "weights_bytes": weights_bytes(model)}


def count_work(rows: list[Scored], plan: list[list[int]]) -> dict[str, int]:
    """Rows and tokens that the plan's steps train on; a row counts its tokens once an epoch."""
    trained = [rows[index] for batch in plan for index in batch]
    return {
        "train_rows": len({index for batch in plan for index in batch}),
        "train_tokens": sum(len(row.ids) for row in trained),
        "completion_tokens": sum(len(row.ids) - row.start for row in trained),
    }


def memory(
    spec: dict[str, Any], work: Work, device: Device, state: TrainerState, held: dict[str, int], load_peak: int
) -> dict[str, Any]:
    """One process's memory, the largest one's, and by part as planned and as measured. held: the parts that lie there
    from the start. Weights that are divided have no formulas, and no parts.
    """
    peak, peak_rss, process = map(int, largest([peak_bytes(device), max(load_peak, peak_rss_bytes()), held["process"]]))
    peaks = {"peak_train_bytes": peak, "peak_rss_bytes": peak_rss}
    if sharding(spec) != "none":
        return peaks | {"predicted_train_bytes": None}
    planned = planned_memory(spec, work.sequences, work.largest_shares(), device, work.way)
    step = next(entry for entry in state.log_history if "optimiser_bytes" in entry)
    known = held | {"process": process, "optimiser": step["optimiser_bytes"]}
    return peaks | {
        "predicted_train_bytes": sum(planned.values()) if planned else None,
        "planned_memory": planned,
        "measured_memory": known | {"rest": peak - sum(known.values())},
        "gradients_bytes": step["gradients_bytes"],
    }


def save(model: Any, spec: dict[str, Any], folder: Path) -> None:
    """safetensors and configuration, without a path of this machine and without PEFT's empty README."""
    weights = whole_weights(model) if is_sharded(model) else None
    if not is_first_rank():
        return
    if spec["method"] == "full":
        model.config.use_cache = True  # it was off to train
        model.save_pretrained(str(folder))
        return
    model.peft_config["default"].base_model_name_or_path = spec["base_name"]
    save_adapter(model, folder, weights)
    (folder / "README.md").unlink(missing_ok=True)
    if is_taken_off(spec):
        as_plain_lora(folder, Path(spec["step0"]))


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
