"""A killed training resumes and ends with the bit-identical adapter, wherever it was killed.

Run: pytest tests/training/test_kill.py; TUNEGATE_KILLS=20 adds so many kills at random moments.
"""

import os
from functools import partial
from pathlib import Path
from random import Random
from shutil import copytree

import pytest
import torch

from data_contracts.jobs.evaluation import EvaluateJob, ScoredModel
from data_contracts.jobs.training import TrainJob
from data_contracts.run_spec import EvaluateSpec
from tasks.runtime.store import digest
from tasks.runtime.workers.harness import say
from tests.support.faults import STEP, TRAINER, adapter, before_call, changed, events, kill, report, run, training_job


@pytest.fixture(scope="module")
def job(tiny_base, tmp_path_factory) -> TrainJob:
    return training_job(tiny_base, tmp_path_factory.mktemp("kill"))


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory) -> Path:
    """An arm trained without a break."""
    out = tmp_path_factory.mktemp("whole")
    assert run("train_adapter", job, out) == 0
    assert report(out)["steps"] == 10
    return out


def test_two_undisturbed_runs_end_with_the_same_bytes(job, whole, tmp_path):
    assert run("train_adapter", job, tmp_path) == 0
    assert adapter(tmp_path) == adapter(whole)
    assert [point["loss_nats"] for point in report(tmp_path)["loss"]] == [
        point["loss_nats"] for point in report(whole)["loss"]
    ]


def test_two_undisturbed_qlora_runs_from_the_raw_base_on_end_with_the_same_bytes(tiny_base, tmp_path):
    """The step-0 adapter, quantisation and dropout included."""
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        job = training_job(tiny_base, tmp_path / name, method="qlora")
        assert job.settings.dropout > 0
        assert run("train_adapter", job, tmp_path / name / "out") == 0
        found.append((digest(job.step0), adapter(tmp_path / name / "out")))
    assert found[0] == found[1]


# --- killed -------------------------------------------------------------------------------------------------

KILLED = -9
# where it is killed: the function about to be called, for which time, and the step it resumes from
PLACES = {
    "in a step": (*STEP, 8, 6),
    "before the first checkpoint": (*STEP, 2, 0),
    "as a checkpoint's files are written": ("torch", "save", 7, 3),
    "as the files are there, but not the manifest": ("tasks.training.workers.checkpoints", "_seal", 2, 3),
    "as old checkpoints are deleted": ("tasks.training.workers.checkpoints", "_delete_old_ones", 3, 9),
    "in the validation after training": (*STEP, 11, 10),
    "as the adapter is saved": ("tasks.training.workers.train_adapter", "save_trained", 1, 10),
}


def ends_as_if_never_killed(job: TrainJob, out: Path, whole: Path, from_step: int) -> None:
    assert run("train_adapter", job, out) == 0
    assert adapter(out) == adapter(whole)
    resumed, expected = report(out), report(whole)
    assert resumed["resumed_from_step"] == from_step
    for name in ("final_validation_nll_nats", "train_tokens", "steps", "validation", "best_step", "stopped_early"):
        assert resumed[name] == expected[name]
    points = [[(point["step"], point["loss_nats"]) for point in found["loss"]] for found in (resumed, expected)]
    assert points[0] == points[1]


@pytest.mark.parametrize(("owner", "name", "number", "from_step"), PLACES.values(), ids=PLACES)
def test_wherever_it_is_killed_the_adapter_is_the_same(job, whole, tmp_path, owner, name, number, from_step):
    assert run("train_adapter", job, tmp_path, partial(before_call, owner, name, number, kill)) == KILLED
    assert not (tmp_path / "report.json").exists()
    ends_as_if_never_killed(job, tmp_path, whole, from_step)


def test_killed_again_and_again_it_still_ends_with_the_same_adapter(job, whole, tmp_path):
    for step in (5, 3, 4):  # of each start
        assert run("train_adapter", job, tmp_path, partial(before_call, *STEP, step, kill)) == KILLED
    ends_as_if_never_killed(job, tmp_path, whole, from_step=6)


@pytest.fixture(scope="module")
def killed(job, tmp_path_factory) -> Path:
    """An arm killed in step 8: it has checkpoints 3 and 6."""
    out = tmp_path_factory.mktemp("killed")
    assert run("train_adapter", job, out, partial(before_call, *STEP, 8, kill)) == KILLED
    return out


# --- damaged checkpoints ------------------------------------------------------------------------------------


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def link(file: Path) -> None:
    """The same bytes, but behind a link to elsewhere: its owner could change them."""
    elsewhere = file.rename(file.parent.parent.parent / f"{file.parent.parent.name}-elsewhere")
    file.symlink_to(elsewhere)


def add(file: Path) -> None:
    """A file that Trainer would prefer to the adapter."""
    file.with_name("pytorch_model.bin").write_bytes(file.read_bytes())


@pytest.mark.parametrize(
    ("damage", "file", "said"),
    [
        (cut, "optimizer.pt", "bytes instead of"),
        (flip, "adapter_model.safetensors", "is damaged"),
        (flip, "trainer_state.json", "is damaged"),
        (flip, "manifest.json", ""),
        (Path.unlink, "rng_state.pth", "is missing"),
        (link, "optimizer.pt", "link to elsewhere"),
        (add, "adapter_model.safetensors", "does not belong"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(job, whole, killed, tmp_path, damage, file, said):
    out = copytree(killed, tmp_path / "out")
    damage(out / "checkpoint-6" / file)
    ends_as_if_never_killed(job, out, whole, from_step=3)
    (note,) = [note["text"] for note in events(out, "note") if "skipped" in note["text"]]
    assert note.startswith("checkpoint-6 is skipped: ")
    assert said in note


def test_two_checkpoints_are_kept(whole):
    assert sorted(folder.name for folder in whole.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-9"]


def test_a_resume_unpickles_no_object(job, killed, tmp_path):
    out = copytree(killed, tmp_path / "out")
    assert run("train_adapter", job, out, list_loads) == 0
    loads = events(out, "load")
    assert {Path(load["file"]).name for load in loads} >= {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert all(load["weights_only"] and Path(load["file"]).parent == out / "checkpoint-6" for load in loads)


def list_loads() -> None:
    load = torch.load

    def reported_load(file, *args, **kwargs):
        say("load", file=str(file), weights_only=kwargs.get("weights_only", False))
        return load(file, *args, **kwargs)

    torch.load = reported_load


# --- the best validation, and an early end ------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopping(job) -> TrainJob:
    """Step 5 has the lowest validation loss of steps 1 to 7; after 6 and 7 without a lower one, training stops."""
    return changed(job, learning_rate=3e-2, validation_steps=1, early_stopping_patience=2)


@pytest.fixture(scope="module")
def stopped(stopping, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("stopped")
    assert run("train_adapter", stopping, out) == 0
    return out


def test_training_stops_early_and_keeps_the_adapter_of_the_lowest_validation_loss(stopped):
    found = report(stopped)
    curve = {point["step"]: point["nll_nats"] for point in found["validation"]}
    assert list(curve) == [1, 2, 3, 4, 5, 6, 7]
    assert min(curve, key=curve.get) == found["best_step"] == 5
    assert found["stopped_early"]
    assert found["steps"] == len(found["loss"]) == 7
    assert found["final_validation_nll_nats"] == curve[5]
    assert found["train_tokens"] < 7 * 256


@pytest.fixture(scope="module")
def waiting(stopping, tmp_path_factory) -> Path:
    """Killed in step 7: checkpoint 6 has waited once, checkpoint 5 has the best adapter."""
    out = tmp_path_factory.mktemp("waiting")
    assert run("train_adapter", stopping, out, partial(before_call, TRAINER, "training_step", 7, kill)) == KILLED
    return out


@pytest.mark.parametrize(
    ("name", "number", "from_step"),
    [("training_step", 4, 3), ("evaluate", 7, 6), ("_save_checkpoint", 6, 5)],
)
def test_a_killed_run_keeps_its_best_and_its_patience(stopping, stopped, tmp_path, name, number, from_step):
    assert run("train_adapter", stopping, tmp_path, partial(before_call, TRAINER, name, number, kill)) == KILLED
    ends_as_if_never_killed(stopping, tmp_path, stopped, from_step)


def test_a_run_killed_after_its_early_end_trains_no_further(stopping, stopped, tmp_path):
    saving = partial(before_call, "tasks.training.workers.train_adapter", "save_trained", 1, kill)
    assert run("train_adapter", stopping, tmp_path, saving) == KILLED
    ends_as_if_never_killed(stopping, tmp_path, stopped, from_step=7)


def test_a_checkpoint_whose_best_is_damaged_is_skipped(stopping, stopped, waiting, tmp_path):
    out = copytree(waiting, tmp_path / "out")
    flip(out / "checkpoint-5" / "adapter_model.safetensors")
    ends_as_if_never_killed(stopping, out, stopped, from_step=0)
    assert "checkpoint-6 is skipped: its best, checkpoint-5" in (out / "stdout").read_text()


def test_a_store_can_be_moved_between_a_kill_and_the_next_run(stopping, stopped, waiting, tmp_path):
    moved = copytree(waiting, tmp_path / "moved")
    waiting.rename(tmp_path / "gone")
    ends_as_if_never_killed(stopping, moved, stopped, from_step=6)
    (tmp_path / "gone").rename(waiting)


# --- evaluation, and at random ------------------------------------------------------------------------------


def test_a_killed_evaluation_scores_only_what_is_missing(job, whole, tmp_path):
    targets = [
        ScoredModel(name=name, method="lora", adapter_folder=adapter_folder, quantisation=None, merged=False)
        for name, adapter_folder in (("base", None), ("lora", str(whole / "adapter")))
    ]
    settings = EvaluateSpec(tasks=["domain_nll"], sample_questions=1, sample_tokens=4).model_dump(exclude={"forms"})
    place = {"base": str(job.base), "test": str(job.validation), "max_tokens": 256, "precision": "fp32", "threads": 1}
    asked = EvaluateJob(**settings | place, targets=targets, before={})
    assert run("evaluate_models", asked, tmp_path / "whole") == 0
    scoring = partial(before_call, "tasks.evaluation.workers.evaluate_models", "sample_lines", 2, kill)
    assert run("evaluate_models", asked, tmp_path / "killed", scoring) == KILLED
    first = (tmp_path / "killed" / "base" / "result.json").stat().st_mtime_ns
    assert run("evaluate_models", asked, tmp_path / "killed") == 0
    assert (tmp_path / "killed" / "base" / "result.json").stat().st_mtime_ns == first
    for target in ("base", "lora"):
        samples = [(tmp_path / place / target / "samples.jsonl").read_bytes() for place in ("whole", "killed")]
        assert samples[0] == samples[1] != b""


@pytest.mark.parametrize("seed", range(int(os.environ.get("TUNEGATE_KILLS", "0"))))
def test_killed_at_random_moments_the_adapter_is_the_same(stopping, stopped, tmp_path, seed):
    """By the clock, from outside: in the middle of whatever is being done. At most 20 kills, then it may end."""
    random, seconds = Random(seed), report(stopped)["seconds"]
    for _ in range(20):
        if run("train_adapter", stopping, tmp_path, seconds=random.uniform(0.2, 1.0) * seconds) == 0:
            break
    assert run("train_adapter", stopping, tmp_path) == 0
    assert adapter(tmp_path) == adapter(stopped)
    assert report(tmp_path)["validation"] == report(stopped)["validation"]
