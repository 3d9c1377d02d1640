"""What stops a training run leaves its last good checkpoint and says what to do; out of memory stops none.

Run: pytest tests/training/test_stops.py
"""

import json
import resource
import signal
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel

from data_contracts.errors import ConfigError, DataError, StoreError, TransientError
from data_contracts.jobs import Job
from data_contracts.jobs.training import TrainJob
from data_contracts.train_spec import TrainSpec
from tasks.models.workers.chat_template import load_chat
from tasks.models.workers.loading import load_base
from tasks.models.workers.scoring import to_tensors
from tasks.runtime.processes import run_worker, worker_error
from tasks.runtime.workers.device import Device
from tasks.training.workers import trainer as packed_trainer
from tasks.training.workers.callbacks import LossWatch
from tests.conftest import toy_rows
from tests.support.faults import (
    STEP,
    TRAINER,
    adapter,
    before_call,
    changed,
    events,
    kill,
    report,
    run,
    send,
    training_job,
)


@pytest.fixture(scope="module")
def job(tiny_base, tmp_path_factory) -> TrainJob:
    return training_job(tiny_base, tmp_path_factory.mktemp("stops"))


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    assert run("train_adapter", job, out) == 0
    return out


def error(out: Path) -> tuple[str, dict]:
    """The kind of error that a worker ended with, and its one problem."""
    found = json.loads((out / "error.json").read_text())
    (problem,) = found["problems"]
    return found["error"], problem


def checkpoints(out: Path) -> list[str]:
    return sorted(folder.name for folder in out.glob("checkpoint-*"))


# --- before it starts ---------------------------------------------------------------------------------------


def test_patience_needs_something_to_count():
    with pytest.raises(ValueError, match="set validation_steps too"):
        TrainSpec(early_stopping_patience=2)


def test_validation_without_a_row_is_an_error_before_training(job, tmp_path):
    (tmp_path / "none.jsonl").write_text("")
    empty = changed(job, validation=tmp_path / "none.jsonl")
    assert run("train_adapter", changed(empty, validation_steps=2), tmp_path / "asked") == DataError.exit_code
    assert "no validation row" in error(tmp_path / "asked")[1]["what"]
    assert run("train_adapter", empty, tmp_path / "not asked") == 0
    assert report(tmp_path / "not asked")["final_validation_nll_nats"] is None


# --- signals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signals", [(signal.SIGTERM,), (signal.SIGINT, signal.SIGTERM)])
def test_a_signal_ends_training_with_a_checkpoint_of_the_step_at_hand(job, whole, tmp_path, signals):
    asked = partial(before_call, *STEP, 5, partial(send, *signals))
    assert run("train_adapter", job, tmp_path, asked) == TransientError.exit_code
    stopped = worker_error(TransientError.exit_code, "train", tmp_path)
    assert isinstance(stopped, TransientError)
    assert f"stopped at step 5 of 10 by {signals[-1].name}" in str(stopped)
    assert "run again to resume" in str(stopped)
    assert checkpoints(tmp_path) == ["checkpoint-3", "checkpoint-5"]
    assert run("train_adapter", job, tmp_path) == 0
    assert report(tmp_path)["resumed_from_step"] == 5
    assert adapter(tmp_path) == adapter(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_outside_of_training_a_signal_ends_a_worker_at_once(job, tmp_path, number):
    validating = partial(before_call, *STEP, 11, partial(send, number))
    assert run("train_adapter", job, tmp_path, validating) == -number
    assert isinstance(worker_error(-number, "train", tmp_path), TransientError)


def test_a_worker_that_has_no_room_for_its_reason_reports_it_all_the_same(tmp_path):
    """The kill matrix fills a real disk."""
    with pytest.raises(StoreError, match=r"(?s)the disk is full.*make room"):
        run_worker("tests.support.worker_without_room", Job(), tmp_path)
    assert not (tmp_path / "error.json").exists()


# --- loss ---------------------------------------------------------------------------------------------------


def change_losses(first: int, change) -> None:
    """Change the losses of every step from `first` on."""
    losses, calls = packed_trainer.scored_losses, iter(range(1, 1000))
    packed_trainer.scored_losses = lambda model, batch: (
        change(losses(model, batch)) if next(calls) >= first else losses(model, batch)
    )


def to_nan(losses: torch.Tensor) -> torch.Tensor:
    return losses * torch.nan


def with_a_nan_gradient(losses: torch.Tensor) -> torch.Tensor:
    return losses + (losses * 0).sqrt()  # 0, with a slope of infinity


def five_nats_up(losses: torch.Tensor) -> torch.Tensor:
    return losses + 5


@pytest.mark.parametrize(
    ("change", "said"), [(to_nan, "the loss is nan"), (with_a_nan_gradient, "the gradient norm is nan")]
)
def test_a_loss_or_gradient_that_is_no_number_stops_training_at_once(job, whole, tmp_path, change, said):
    assert run("train_adapter", job, tmp_path, partial(change_losses, 6, change)) == ConfigError.exit_code
    kind, problem = error(tmp_path)
    assert (kind, problem["what"]) == ("ConfigError", said)
    assert problem["where"].startswith("step 6 (loss ")
    assert "learning rate 0.00587" in problem["where"]
    assert f"rows {0:012x}"[:12] in problem["where"]
    assert "lower train.learning_rate" in problem["act"]
    assert problem["act"].endswith(f"the last good checkpoint is {tmp_path / 'checkpoint-3'}")
    assert checkpoints(tmp_path) == ["checkpoint-3"]


def ruin_a_weight(number: int) -> None:
    """The optimiser's step of this number makes a weight NaN, though loss and gradient were finite."""
    update, calls = torch.optim.AdamW.step, iter(range(1, 1000))

    def step(optimizer, *args, **kwargs):
        update(optimizer, *args, **kwargs)
        if next(calls) == number:
            optimizer.param_groups[0]["params"][0].data.fill_(torch.nan)

    torch.optim.AdamW.step = step


def test_weights_that_are_no_numbers_are_never_saved(job, tmp_path):
    assert run("train_adapter", job, tmp_path, partial(ruin_a_weight, 6)) == ConfigError.exit_code
    kind, problem = error(tmp_path)
    assert (kind, problem["where"]) == ("ConfigError", "step 6")
    assert problem["what"] == "a weight is not finite"
    assert checkpoints(tmp_path) == ["checkpoint-3"]


def test_a_climbing_loss_stops_training_at_the_same_step_killed_or_not(job, tmp_path):
    watched = changed(job, max_steps=20, max_loss_rise_nats=2.0)
    climbing = partial(change_losses, 12, five_nats_up)
    assert run("train_adapter", watched, tmp_path, climbing) == ConfigError.exit_code
    kind, problem = error(tmp_path)
    assert kind == "ConfigError"
    assert "nats above its lowest" in problem["what"]
    assert problem["limit"] == "2.0 nats (train.max_loss_rise_nats)"
    stopped_at = problem["where"].partition(" (")[0]
    assert run("train_adapter", watched, tmp_path, partial(change_losses, 1, five_nats_up)) == ConfigError.exit_code
    assert error(tmp_path)[1]["where"].partition(" (")[0] == stopped_at
    assert events(tmp_path, "start")[1]["step"] == 15


def watch(limit: float | None, losses: list[float]) -> int | None:
    """The step at which the watch stops a run with these losses."""
    watching = LossWatch(SimpleNamespace(row_ids=["row"], plan=[[0]] * len(losses)), Path("nowhere"), limit)
    state = SimpleNamespace(global_step=0, log_history=[])
    watching.on_train_begin(None, state, None)
    for step, loss in enumerate(losses, start=1):
        state.global_step = step
        try:
            watching.on_log(None, state, None, logs={"loss": loss, "grad_norm": 1.0, "learning_rate": 1e-4})
        except ConfigError:
            return step
    return None


def test_the_watch_lets_noise_pass_and_stops_a_rise_that_stays():
    noise = [3.0, 1.0] * 20
    assert watch(2.0, noise) is None
    assert watch(2.0, [*noise, 20.0]) is None  # one step: its tenth is below the limit
    assert watch(2.0, [*noise, *[5.0] * 10]) == 48
    assert watch(None, [*noise, *[500.0] * 20]) is None


# --- disk ---------------------------------------------------------------------------------------------------


def most_file_bytes(most: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))


@pytest.mark.parametrize(("most", "said"), [(40_000, "Error while"), (100_000, "the disk took")])  # adapter, optimiser
def test_a_full_disk_leaves_the_last_good_checkpoint_and_says_what_is_needed(job, whole, tmp_path, most, said):
    full = partial(before_call, *STEP, 5, partial(most_file_bytes, most))
    assert run("train_adapter", job, tmp_path, full) == 4
    kind, problem = error(tmp_path)
    assert kind == "StoreError"
    assert problem["what"].startswith(f"checkpoint-6 could not be written: {said}")
    assert problem["where"] == str(tmp_path)
    assert problem["limit"].startswith("it needs 0.2 MB, ")
    assert problem["act"].startswith("make room, or move the store")
    assert problem["act"].endswith(str(tmp_path / "checkpoint-3"))
    assert checkpoints(tmp_path) == ["checkpoint-3"]
    assert run("train_adapter", job, tmp_path) == 0
    assert adapter(tmp_path) == adapter(whole)


# --- memory -------------------------------------------------------------------------------------------------

OUT_OF_MEMORY = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: ..."
    ),
    "python": MemoryError("Unable to allocate 2.00 GiB"),
}


def fail(kind: str) -> None:
    raise OUT_OF_MEMORY[kind]


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_out_of_memory_halves_the_micro_batch_and_the_report_says_so(job, whole, tmp_path, kind):
    assert run("train_adapter", job, tmp_path, partial(before_call, *STEP, 4, partial(fail, kind))) == 0
    assert report(tmp_path)["micro_batches"] == 2
    assert report(whole)["micro_batches"] == 1
    assert (
        report(tmp_path)["batch_reason"]
        == f"{report(whole)['batch_reason']}; computed in 2 parts, since memory ran out"
    )
    assert "out of memory at step 4: from here each step is computed in 2 parts" in (tmp_path / "stdout").read_text()
    for name in ("steps", "train_tokens", "completion_tokens"):
        assert report(tmp_path)[name] == report(whole)[name]


def fail_then_die() -> None:
    before_call(*STEP, 4, partial(fail, "cuda"))
    before_call(TRAINER, "training_step", 8, kill)


def test_a_killed_run_resumes_with_its_smaller_micro_batch(job, tmp_path):
    once = partial(before_call, *STEP, 4, partial(fail, "cuda"))
    assert run("train_adapter", job, tmp_path / "whole", once) == 0
    assert run("train_adapter", job, tmp_path / "killed", fail_then_die) == -signal.SIGKILL
    assert run("train_adapter", job, tmp_path / "killed") == 0
    assert report(tmp_path / "killed")["micro_batches"] == 2
    assert adapter(tmp_path / "killed") == adapter(tmp_path / "whole")


def always_fail() -> None:
    packed_trainer.scored_losses = lambda model, batch: fail("cuda")


def test_memory_that_does_not_hold_one_row_is_an_error_with_the_next_act(job, tmp_path):
    assert run("train_adapter", job, tmp_path, always_fail) == ConfigError.exit_code
    kind, problem = error(tmp_path)
    assert kind == "ConfigError"
    assert problem["what"] == "memory does not hold one row (CUDA out of memory. Tried to allocate 2.00 GiB.)"
    assert "lower train.max_tokens" in problem["act"]


def other_error() -> None:
    raise RuntimeError("shapes do not fit")


def test_another_error_is_not_taken_for_out_of_memory(job, tmp_path):
    assert run("train_adapter", job, tmp_path, partial(before_call, *STEP, 4, other_error)) == 1


@pytest.fixture
def trainer(tiny_base, tmp_path) -> packed_trainer.PackedTrainer:
    """A trainer whose only step has seven rows, without dropout."""
    job = training_job(tiny_base, tmp_path, dropout=0.0)
    device = Device("cpu", "fp32", "test", 1, "test")
    model = PeftModel.from_pretrained(load_base(tiny_base, "lora", device), job.step0, is_trainable=True)
    rows = [load_chat(tiny_base).scored(row["messages"]) for row in toy_rows(7)]
    data = packed_trainer.TrainingData(rows, [""] * 7, [list(range(7))], [], 512, "packed")
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # Trainer renames a setting
        args = packed_trainer.training_arguments(job, tmp_path, device, 1)
    return packed_trainer.PackedTrainer(model, data, args, [])


def whole_gradient(trainer) -> list[torch.Tensor]:
    rows = trainer.data.sequences
    losses = packed_trainer.scored_losses(trainer.model, to_tensors(rows))
    (losses.sum() / sum(len(row.ids) - row.start for row in rows)).backward()
    return gradients(trainer.model)


def step_gradient(trainer) -> list[torch.Tensor]:
    trainer.training_step(trainer.model, to_tensors(trainer.data.sequences))
    return gradients(trainer.model)


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    pairs = list(zip(found, wanted, strict=True))
    return bool(pairs) and all((a - b).norm() <= 1e-5 * b.norm() + 1e-9 for a, b in pairs)


@pytest.mark.parametrize(("micro_batches", "parts"), [(1, 1), (2, 2), (64, 7)])
def test_the_parts_of_a_step_add_up_to_its_gradient(trainer, micro_batches, parts):
    wanted = whole_gradient(trainer)
    trainer.micro_batches = micro_batches
    assert len(trainer._parts(to_tensors(trainer.data.sequences))) == parts
    assert same(step_gradient(trainer), wanted)


def test_parts_that_were_computed_before_memory_ran_out_count_once(trainer, monkeypatch):
    wanted = whole_gradient(trainer)
    monkeypatch.setattr(packed_trainer, "scored_losses", packed_trainer.scored_losses)
    before_call(*STEP, 2, partial(fail, "cuda"))
    trainer.micro_batches = 2
    found = step_gradient(trainer)
    assert trainer.micro_batches == 4
    assert same(found, wanted)


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return found
