"""Several workers train as one does: same loss curve, same adapter but for rounding, and killed or not the same bytes.

Run: pytest tests/training/test_devices.py, and -m slow for the longer ones. Two ranks on one machine, over gloo. Not
covered, and why: NCCL, CUDA, NF4 kernels of a GPU and machines in a network (none at hand).
"""

import threading
from contextlib import suppress
from functools import partial
from pathlib import Path
from shutil import copytree

import psutil
import pytest
from safetensors.torch import load_file

from data_contracts.errors import ConfigError, TransientError, WorkerError
from data_contracts.jobs.models import InitAdapterJob, PrefixStart
from data_contracts.jobs.training import TrainJob
from data_contracts.train_spec import TrainSpec
from tasks.models.core.packing import ScoredSequence, shares
from tasks.pipeline.policies import stage_key
from tasks.runtime.processes import run_worker, worker_error
from tasks.runtime.store import digest
from tasks.runtime.workers.launch import launch_ranks
from tests.support.faults import adapter, before_call, changed, events, kill, report, run, run_together, training_job

LOSSES = ("tasks.training.workers.trainer", "_losses")  # called once each step, with divided weights or not
# Rounding: the same sums, in another order.
LOSS, WEIGHTS = 1e-5, 1e-5


@pytest.fixture(scope="module")
def job(tiny_base, tmp_path_factory) -> TrainJob:
    """No dropout: two ranks draw other noise than one."""
    return training_job(tiny_base, tmp_path_factory.mktemp("job"), dropout=0.0)


@pytest.fixture(scope="module")
def dropping(tiny_base, tmp_path_factory) -> TrainJob:
    """Two workers, with dropout."""
    return training_job(tiny_base, tmp_path_factory.mktemp("dropping"), workers=2)


@pytest.fixture(scope="module")
def validating(job) -> TrainJob:
    """Steps of one or two rows, so that a rank is idle in some, and a validation after each."""
    return changed(job, batch_tokens=100, validation_steps=1, early_stopping_patience=9, workers=2)


@pytest.fixture(scope="module")
def pair(dropping, tmp_path_factory) -> Path:
    """An arm that two ranks trained without a break, with dropout."""
    out = tmp_path_factory.mktemp("pair")
    assert run_together(dropping, out) == [0, 0]
    return out


def no_memory() -> None:
    raise MemoryError("Unable to allocate 2.00 GiB")


def difference(out: Path, other: Path) -> tuple[float, float]:
    """Largest relative difference of a step's loss; relative distance of the adapters."""
    curves = [[point["loss_nats"] for point in report(place)["loss"]] for place in (out, other)]
    assert len(curves[0]) == len(curves[1])
    found, wanted = (load_file(next((place / "adapter").glob("*model.safetensors"))) for place in (out, other))
    assert found.keys() == wanted.keys()
    apart = sum(float((found[name] - wanted[name]).norm()) ** 2 for name in wanted) ** 0.5
    size = sum(float(tensor.norm()) ** 2 for tensor in wanted.values()) ** 0.5
    return max(abs(a - b) / b for a, b in zip(*curves, strict=True)), apart / size


# --- equal to one process -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "sharding", "checkpointing"),
    [("lora", "none", True), ("qlora", "none", False), ("lora", "fsdp", False), ("qlora", "fsdp", True)],
)
def test_two_ranks_have_the_loss_curve_and_the_adapter_of_one(job, tmp_path, method, sharding, checkpointing):
    one_rank = changed(job, method=method, activation_checkpointing=checkpointing)
    assert run("train_adapter", one_rank, tmp_path / "one") == 0
    assert run_together(changed(one_rank, workers=2, sharding=sharding), tmp_path / "two") == [0, 0]
    loss, weights = difference(tmp_path / "two", tmp_path / "one")
    assert loss < LOSS
    assert weights < WEIGHTS
    one, two = report(tmp_path / "one"), report(tmp_path / "two")
    assert (one["workers"], two["workers"]) == (1, 2)
    assert two["batch_reason"] == f"{one['batch_reason']}; shared by 2 workers"
    assert ("measured_memory" in two) == (sharding == "none")
    same = ("train_tokens", "completion_tokens", "steps", "trainable_parameters", "weights_bytes")
    assert [two[name] for name in same] == [one[name] for name in same]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "prefix"])
def test_two_ranks_train_all_weights_or_a_prefix_as_one_does(job, tiny_base, tmp_path, method):
    own = {"method": method, "methods": [method], "step0": None, "learning_rate": 1e-2}
    if method == "prefix":
        start = InitAdapterJob(base=tiny_base, settings=PrefixStart(seed=5, prefix_tokens=8))
        assert run("init_adapter", start, tmp_path / "step0") == 0
        own |= {"step0": tmp_path / "step0" / "adapter", "prefix_tokens": 8, "learning_rate": 0.3}
    one_rank = changed(job, **own)
    two_ranks = changed(one_rank, workers=2)
    assert run("train_adapter", one_rank, tmp_path / "one") == 0
    assert run_together(two_ranks, tmp_path / "two") == [0, 0]
    loss, weights = difference(tmp_path / "two", tmp_path / "one")
    assert loss < LOSS
    assert weights < WEIGHTS
    assert run_together(two_ranks, tmp_path / "again") == [0, 0]
    assert digest(tmp_path / "again" / "adapter") == digest(tmp_path / "two" / "adapter")


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_ranks_agree_on_the_best_validation_and_the_early_end(validating, tmp_path, sharding):
    stopping = changed(validating, learning_rate=3e-2, early_stopping_patience=2, batch_tokens=256)
    assert run("train_adapter", stopping, tmp_path / "one") == 0
    assert run_together(changed(stopping, sharding=sharding), tmp_path / "two") == [0, 0]
    one, two = report(tmp_path / "one"), report(tmp_path / "two")
    assert one["stopped_early"]
    assert [two[name] for name in ("best_step", "stopped_early", "steps")] == [5, True, 7]
    assert one["best_step"] == 5
    assert two["final_validation_nll_nats"] == pytest.approx(one["final_validation_nll_nats"], rel=LOSS)
    assert difference(tmp_path / "two", tmp_path / "one")[1] < WEIGHTS


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_a_rank_without_a_row_changes_nothing(validating, tmp_path, sharding):
    small = changed(validating, batch_tokens=64)
    assert run("train_adapter", small, tmp_path / "one") == 0
    assert run_together(changed(small, sharding=sharding), tmp_path / "two") == [0, 0]
    assert report(tmp_path / "one")["train_rows"] == 10  # one a step
    assert max(difference(tmp_path / "two", tmp_path / "one")) < WEIGHTS


def test_shares_are_balanced_complete_and_keep_common_starts_together():
    lengths = [9, 30, 12, 12, 4, 40, 7]
    rows = [ScoredSequence([i % 3, *range(100 * i, 100 * i + n - 1)], 1) for i, n in enumerate(lengths)]
    for ranks in (1, 2, 3, 10):
        parts = shares(rows, ranks)
        assert sorted(i for part in parts for i in part) == list(range(7))
        assert all(sum(lengths[i] for i in part) <= sum(lengths) / ranks + max(lengths) for part in parts)
    assert shares(rows, 1) == [list(range(7))]
    alike = [ScoredSequence([i % 2, *range(100 * i, 100 * i + 9)], 1) for i in range(6)]
    assert shares(alike, 2) == [[0, 2, 4], [1, 3, 5]]


# --- killed, stopped, broken --------------------------------------------------------------------------------

KILLED = -9
SEAL = ("tasks.training.workers.checkpoints", "_seal")
PLACES = {
    "rank 1 in a step": (1, *LOSSES, 8, 6),
    "rank 1 as its random states are written": (1, "torch", "save", 2, 3),
    "rank 0 as all files are there, but not the manifest": (0, *SEAL, 2, 3),
}


def ends_as_if_never_killed(dropping: TrainJob, out: Path, pair: Path, from_step: int) -> None:
    assert run_together(dropping, out) == [0, 0]
    assert report(out)["resumed_from_step"] == from_step
    assert adapter(out) == adapter(pair)
    assert [p["loss_nats"] for p in report(out)["loss"]] == [p["loss_nats"] for p in report(pair)["loss"]]


@pytest.mark.parametrize(("victim", "owner", "name", "number", "from_step"), PLACES.values(), ids=PLACES)
def test_whichever_rank_is_killed_all_end_and_resume_to_the_same_bytes(
    dropping, pair, tmp_path, victim, owner, name, number, from_step
):
    codes = run_together(dropping, tmp_path, {victim: partial(before_call, owner, name, number, kill)})
    assert codes[victim] == KILLED
    assert codes[1 - victim] not in (0, None)
    assert not (tmp_path / "report.json").exists()
    ends_as_if_never_killed(dropping, tmp_path, pair, from_step)


@pytest.mark.slow
def test_divided_weights_are_put_together_in_checkpoints_and_taken_apart_again(dropping, tmp_path):
    sharded = changed(dropping, sharding="fsdp")
    assert run_together(sharded, tmp_path / "whole") == [0, 0]
    assert KILLED in run_together(sharded, tmp_path / "killed", {1: partial(before_call, *LOSSES, 8, kill)})
    assert run_together(sharded, tmp_path / "killed") == [0, 0]
    assert report(tmp_path / "killed")["resumed_from_step"] == 6
    assert adapter(tmp_path / "killed") == adapter(tmp_path / "whole")


@pytest.mark.parametrize(("workers", "said"), [(2, "rng_state_1.pth is missing"), (1, "another number of workers")])
def test_a_checkpoint_without_every_ranks_random_states_is_not_taken(dropping, pair, tmp_path, workers, said):
    out = copytree(pair, tmp_path / "out")
    if workers == 1:
        assert run("train_adapter", changed(dropping, workers=1), out) == 0
    else:
        (out / "checkpoint-10" / "rng_state_1.pth").unlink()
        ends_as_if_never_killed(dropping, out, pair, from_step=9)
    assert said in next(note["text"] for note in events(out, "note") if "skipped" in note["text"])


def test_a_rank_out_of_memory_computes_its_part_in_parts_and_the_others_follow(job, tmp_path):
    two_ranks = changed(job, workers=2)
    assert run("train_adapter", job, tmp_path / "one") == 0
    assert run_together(two_ranks, tmp_path / "two", {1: partial(before_call, *LOSSES, 4, no_memory)}) == [0, 0]
    assert report(tmp_path / "two")["micro_batches"] == 2
    assert max(difference(tmp_path / "two", tmp_path / "one")) < WEIGHTS


@pytest.mark.slow
def test_out_of_memory_with_divided_weights_is_an_error_with_the_next_act(job, tmp_path):
    sharded = changed(job, workers=2, sharding="fsdp")
    assert ConfigError.exit_code in run_together(sharded, tmp_path, {1: partial(before_call, *LOSSES, 4, no_memory)})
    with pytest.raises(ConfigError, match=r"(?s)share of a step.*raise train\.workers"):
        raise worker_error(1, "train", tmp_path)


def test_a_checkpoint_of_another_number_of_workers_is_in_another_folder():
    keys = {stage_key("train", {"settings": TrainSpec(workers=n)}) for n in (1, 2)}
    assert len(keys) == 2
    assert stage_key("train", {"settings": TrainSpec(engine="ray")}) in keys


def test_settings_that_cannot_go_together_are_refused_before_a_run():
    with pytest.raises(ValueError, match="set workers to 2 or more"):
        TrainSpec(sharding="fsdp")
    with pytest.raises(ValueError, match="set optimizer to adamw_torch"):
        TrainSpec(sharding="fsdp", workers=2, optimizer="adamw_bnb_8bit")


def test_more_workers_than_gpus_is_an_error_before_anything_starts(job, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    (tmp_path / "spec.json").write_text(changed(job, workers=2).model_dump_json())
    assert launch_ranks("tests.support.faulty_rank", tmp_path / "spec.json", tmp_path) == ConfigError.exit_code
    assert "each worker needs a GPU of its own" in str(worker_error(2, "train", tmp_path))


# --- as the pipeline starts them: through torchrun's agent ---------------------------------------------------


def started(dropping: TrainJob, out: Path, monkeypatch, fault: str) -> dict:
    monkeypatch.setenv("TUNEGATE_FAULT", fault)
    return run_worker("tests.support.faulty_rank", dropping, out)


@pytest.mark.slow
def test_a_killed_rank_is_one_transient_error_and_no_process_is_left(dropping, pair, tmp_path, monkeypatch):
    listening = Listening()
    with listening, pytest.raises(TransientError, match=r"rank 1 of 2: killed by signal 9"):
        started(dropping, tmp_path, monkeypatch, "1:8:die")
    assert listening.seen
    assert not listening.alive()
    assert listening.found
    assert listening.found <= {"127.0.0.1", "::1"}
    ends_as_if_never_killed(dropping, tmp_path, pair, from_step=6)


@pytest.mark.slow
def test_a_signal_ends_all_ranks_with_one_checkpoint(dropping, pair, tmp_path, monkeypatch):
    with pytest.raises(TransientError, match=r"stopped at step \d+ of 10 by SIGTERM, with a checkpoint"):
        started(dropping, tmp_path, monkeypatch, "0:4:stop_all")
    last = max(int(folder.name.partition("-")[2]) for folder in tmp_path.glob("checkpoint-*"))
    assert last >= 4
    ends_as_if_never_killed(dropping, tmp_path, pair, from_step=last)


@pytest.mark.slow
def test_what_one_rank_breaks_on_is_what_the_user_reads(dropping, tmp_path, monkeypatch):
    with pytest.raises(WorkerError, match=r"rank 1 of 2: .*shapes do not fit"):
        started(dropping, tmp_path, monkeypatch, "1:4:break_down")


class Listening:
    """Addresses that workers of this test listen on, read until the end of the block."""

    def __init__(self) -> None:
        self.found: set[str] = set()
        self.seen: set[psutil.Process] = set()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def alive(self) -> bool:
        return any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in self.seen)

    def _watch(self) -> None:
        while not self.over.wait(0.1):
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    if any(
                        arg.startswith(("tasks.runtime.workers.launch", "tests.support.faulty_rank"))
                        for arg in child.cmdline()
                    ):
                        self.seen.add(child)
                        self.found |= {c.laddr.ip for c in child.net_connections() if c.status == psutil.CONN_LISTEN}
