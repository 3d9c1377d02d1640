"""Train one arm from its start: `python -m tasks.training.workers.train_adapter spec.json out/`.

Killed and started again with the same out/, it resumes from its last checkpoint. Writes out/adapter/ (with all weights,
if the method is full) and out/report.json; out/rows_too_long.jsonl names the rows that were left out, truncated or
split.
"""

import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftConfig, get_peft_model
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import TrainerState

from data_contracts.errors import ConfigError, DataError, Problem
from data_contracts.jobs.training import TrainJob
from data_contracts.reports import Quantisation
from tasks.models.core.packing import ScoredSequence, plan_batches
from tasks.models.workers.chat_template import Chat, load_chat
from tasks.models.workers.fused_layers import fuse_lora, fuse_mlp, fuse_norms
from tasks.models.workers.loading import QLORA, adapters_bytes, load_base, save_adapter, scanned_adapter, weights_bytes
from tasks.models.workers.pissa_olora_loftq import TAKEN_OFF, as_plain_lora, take_off_start
from tasks.models.workers.scoring import Scoring, choose_way
from tasks.runtime.workers.device import Device, bytes_now, choose_device, peak_bytes, peak_rss_bytes, reset_peak_rss
from tasks.runtime.workers.harness import is_first_rank, main, say
from tasks.runtime.workers.ranks import from_first, joined, largest, rank, ranks
from tasks.training.workers.callbacks import Clock, KeepBest, LossWatch, StepBytes, StopOnSignal, stopped_early
from tasks.training.workers.checkpoints import last_checkpoint, state_of, step_of
from tasks.training.workers.fsdp import is_sharded, whole_weights
from tasks.training.workers.neftune import add_noise
from tasks.training.workers.planned_memory import planned_memory
from tasks.training.workers.trainer import PackedTrainer, StepOptions, TrainingData, mean_loss, training_arguments
from tasks.training.workers.training_rows import encode_rows


def train(job: TrainJob, out: Path) -> dict[str, Any]:
    with joined():
        return train_rank(job, out)


def train_rank(job: TrainJob, out: Path) -> dict[str, Any]:
    """The whole work, or this rank's part of it; the report is the same on all ranks but for times."""
    started = time.monotonic()
    device = choose_device(job.precision, job.settings.threads, job.threads_reason)
    say("device", **vars(device))
    chat = load_chat(job.base)
    listed = out / "rows_too_long.jsonl" if is_first_rank() else Path(os.devnull)
    rows, row_ids = encode_rows(chat, job.train, job.settings.max_tokens, job.settings.too_long, listed)
    plan = planned_steps(rows, job)
    validation = validation_rows(chat, job)
    before = bytes_now(device)
    model = trainable(job, device)
    load_peak = reset_peak_rss()
    scoring = prepare_forward(model, rows, job)
    data = TrainingData(rows, row_ids, plan, validation, job.settings.batch_tokens, scoring.way)
    checkpoint = agreed_checkpoint(out)
    size = size_of(model)
    held = HeldBytes(before, size["weights_bytes"], adapters_bytes(model), load_peak)
    state = run_trainer(model, data, job, out, device, checkpoint)
    trained = history_of(state)
    memory = memory_used(job, data, device, state, held)
    save_trained(model, job, out / "adapter")
    return {
        "method": job.method,
        "quantisation": quantisation.model_dump() if (quantisation := quantisation_of(job)) else None,
        "resumed_from_step": step_of(checkpoint),
        **count_work(rows, plan[: state.global_step], trained["train_seconds"]),
        "rows_too_long": len(listed.read_text().splitlines()),
        "too_long": {"leave_out": "left out", "truncate": "truncated", "split": "split"}[job.settings.too_long],
        **size,
        **memory,
        **trained,
        "final_validation_nll_nats": mean_loss(model, data) if validation else None,
        "seconds": time.monotonic() - started,
        "workers": ranks(),
        **vars(device),
        **batch_facts(rows, plan, job, trained["micro_batches"]),
        "scoring": scoring.way,
        "scoring_reason": scoring.reason,
    }


def planned_steps(rows: list[ScoredSequence], job: TrainJob) -> list[list[int]]:
    """The rows of each optimiser step, for all epochs; how many they are is logged."""
    lengths = [len(row.ids) for row in rows]
    settings = job.settings
    plan = plan_batches(lengths, settings.batch_tokens, settings.epochs, job.seed)[: settings.max_steps]
    say("note", text=": ".join(["batch", *batch_facts(rows, plan, job).values()]))
    return plan


def batch_facts(rows: list[ScoredSequence], plan: list[list[int]], job: TrainJob, parts: int = 1) -> dict[str, str]:
    """What a step holds, and why so much. parts: those that it was computed in at the end."""
    settings = job.settings
    tokens = [sum(len(rows[index].ids) for index in step) for step in plan]
    most = f"at most {max(map(len, plan))} and {max(tokens):,}"
    steps = "train.max_steps" if len(plan) == settings.max_steps else f"train.epochs={settings.epochs}"
    why = f"train.batch_tokens={settings.batch_tokens} is full; {len(plan)} steps, limited by {steps}"
    why += f"; shared by {ranks()} workers" if ranks() > 1 else ""
    why += f"; computed in {parts} parts, since memory ran out" if parts > 1 else ""
    batch = f"{sum(map(len, plan)) / len(plan):.1f} rows and {sum(tokens) / len(plan):,.0f} tokens a step ({most})"
    return {"batch": batch, "batch_reason": why}


def prepare_forward(model: Any, rows: list[ScoredSequence], job: TrainJob) -> Scoring:
    """How losses are computed, which is logged; the model's layers are made ready for it."""
    scoring = choose_way(model, rows, max(len(row.ids) for row in rows))
    if job.is_sharded and scoring.way != "packed":
        raise ConfigError(Problem(f"rows are trained padded ({scoring.reason})", "train.sharding", "none"))
    say("note", text=f"{scoring.way} forward: {scoring.reason}")
    fuse_lora(model)
    fuse_mlp(model)
    fuse_norms(model)
    return scoring


def agreed_checkpoint(out: Path) -> Path | None:
    """The newest complete checkpoint, as rank 0 finds it."""
    step = from_first(step_of(last_checkpoint(out)) if is_first_rank() else 0)
    return out / f"checkpoint-{step}" if step else None


def trainable(job: TrainJob, device: Device) -> Any:
    """The base with the step-0 adapter on it, or with all its weights free: ready to train."""
    quantisation = quantisation_of(job) or QLORA
    if job.is_sharded:  # a device may hold its part only
        model: Any = load_base(job.base, job.method, replace(device, device="cpu"), quantisation, storage=device.dtype)
    else:
        model = load_base(job.base, job.method, device, quantisation, trains_all=job.is_full)
    set_seed(job.seed)
    if job.step0 is not None:
        model = with_adapter(model, str(job.step0))
    model.eval()  # PEFT starts with dropout active, and would make the packed losses differ from the padded ones
    if is_taken_off(job):
        take_off_start(model)
    if job.settings.activation_checkpointing:
        model.enable_input_require_grads()
    if job.settings.neftune_alpha is not None:
        add_noise(model, job.settings.neftune_alpha)
    return model


def with_adapter(base: Any, adapter_folder: str) -> Any:
    """The adapter, trainable. PeftModel.from_pretrained does the same, but for a prefix it refuses to."""
    config = PeftConfig.from_pretrained(scanned_adapter(adapter_folder, base))
    config.inference_mode = False
    model = get_peft_model(base, config)
    model.load_adapter(adapter_folder, "default", is_trainable=True)
    return model


def is_taken_off(job: TrainJob) -> bool:
    return job.has_lora and job.settings.init in TAKEN_OFF


def quantisation_of(job: TrainJob) -> Quantisation | None:
    """Of the base; None in full precision."""
    if job.method != "qlora":
        return None
    return Quantisation(quant_type=job.settings.quant_type, double_quant=job.settings.double_quant)


def run_trainer(
    model: Any, data: TrainingData, job: TrainJob, out: Path, device: Device, checkpoint: Path | None
) -> TrainerState:
    """Train from the checkpoint on; `model` ends as the last step left it, or the best validation if there are any."""
    before, settings = state_of(checkpoint), job.settings
    stop = StopOnSignal()
    callbacks: list[TrainerCallback] = [LossWatch(data, out, settings.max_loss_rise_nats), Clock(), stop]
    if not job.is_sharded:
        callbacks.append(StepBytes())
    if settings.validation_steps is not None:
        callbacks.append(KeepBest(settings.early_stopping_patience))
    options = StepOptions(
        micro_batches=before["log_history"][-1].get("micro_batches", 1) if before else 1,
        lora_plus_ratio=settings.lora_plus_ratio if job.has_lora else None,
        is_sharded=job.is_sharded,
    )
    trainer = PackedTrainer(model, data, training_arguments(job, out, device, len(data.plan)), callbacks, options)
    if not is_first_rank():
        set_seed(job.seed + rank())  # no two ranks drop the same units
    if checkpoint and stopped_early(before):
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    else:
        with stop.listening():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.state.best_global_step:
        trainer.load_weights_of(out / f"checkpoint-{trainer.state.best_global_step}")
    return trainer.state


def validation_rows(chat: Chat, job: TrainJob) -> list[ScoredSequence]:
    """The validation split's rows that are short enough. Raises DataError if validation was asked for and has none."""
    lines = job.validation.read_text().splitlines()
    rows = [chat.scored(json.loads(line)["messages"]) for line in lines]
    rows = [row for row in rows if len(row.ids) <= job.settings.max_tokens]
    if not rows and job.settings.validation_steps is not None:
        act = "raise curate.validation_fraction, or set train.validation_steps to null"
        raise DataError(Problem("there is no validation row to measure", job.validation.name, act=act))
    return rows


def history_of(state: TrainerState) -> dict[str, Any]:
    """What Trainer's log holds, steps before a resume included."""
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


def count_work(rows: list[ScoredSequence], plan: list[list[int]], seconds: float) -> dict[str, float]:
    """Rows and tokens that the plan's steps train on; a row counts its tokens once an epoch."""
    trained = [rows[index] for batch in plan for index in batch]
    tokens = sum(len(row.ids) for row in trained)
    return {
        "train_rows": len({index for batch in plan for index in batch}),
        "train_tokens": tokens,
        "useful_tokens_per_s": tokens / seconds,
        "completion_tokens": sum(len(row.ids) - row.start for row in trained),
    }


@dataclass(frozen=True)
class HeldBytes:
    """What is in memory from the start, and the highest resident memory while the base was loaded."""

    process: int
    weights: int
    adapters: int
    load_peak: int


def memory_used(
    job: TrainJob, data: TrainingData, device: Device, state: TrainerState, held: HeldBytes
) -> dict[str, Any]:
    """One process's memory, the largest one's, and by part as planned and as measured.

    Weights that are divided have no formulas, and no parts.
    """
    peaks = largest([peak_bytes(device), max(held.load_peak, peak_rss_bytes()), held.process])
    peak, peak_rss, process = map(int, peaks)
    used = {"peak_train_bytes": peak, "peak_rss_bytes": peak_rss}
    if job.is_sharded:
        return used | {"predicted_train_bytes": None}
    planned = planned_memory(job, data.sequences, data.largest_shares(), device, data.way)
    step = next(entry for entry in state.log_history if "optimiser_bytes" in entry)
    parts = {
        "process": process,
        "weights": held.weights,
        "adapters": held.adapters,
        "optimiser": step["optimiser_bytes"],
    }
    return used | {
        "predicted_train_bytes": sum(planned.values()) if planned else None,
        "planned_memory": planned,
        "measured_memory": parts | {"rest": peak - sum(parts.values())},
        "gradients_bytes": step["gradients_bytes"],
    }


def save_trained(model: Any, job: TrainJob, folder: Path) -> None:
    """safetensors and configuration, without a path of this machine and without PEFT's empty README."""
    weights = whole_weights(model) if is_sharded(model) else None
    if not is_first_rank():
        return
    if job.is_full:
        model.config.use_cache = True  # it was off to train
        model.save_pretrained(str(folder))
        return
    model.peft_config["default"].base_model_name_or_path = job.base_name
    save_adapter(model, folder, weights)
    (folder / "README.md").unlink(missing_ok=True)
    if job.step0 is not None and is_taken_off(job):
        as_plain_lora(folder, job.step0)


def loss_point(entry: dict[str, float]) -> dict[str, float]:
    return {
        "step": entry["step"],
        "loss_nats": entry["loss"],
        "learning_rate": entry["learning_rate"],
        "seconds": entry["step_seconds"],
    }


WORK, JOB = train, TrainJob

if __name__ == "__main__":
    record(main)(WORK, JOB)  # torchrun learns from it what a rank broke on
