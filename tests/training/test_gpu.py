"""The training worker on a CUDA device: LoRA and NF4 learn there, in bf16 where it has it, with the memory that was
planned.

Run: REQUIRE_GPU=1 pytest -m gpu tests/training/test_gpu.py. Without a CUDA device it is skipped; with REQUIRE_GPU=1
that is a failure. Two GPUs, NCCL and FSDP-QLoRA are not covered: tests/training/test_devices.py runs the same code on
CPUs over gloo.
"""

import os
from pathlib import Path

import pytest
import torch

from tasks.runtime.processes import run_worker
from tests.conftest import step0_job, toy_rows, write_rows
from tests.support.faults import job_on

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def _needs_cuda():
    if torch.cuda.is_available():
        return
    why = "torch is built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
    if os.environ.get("REQUIRE_GPU") == "1":
        pytest.fail(f"REQUIRE_GPU=1, and {why}")
    pytest.skip(why)


def train(base: Path, folder: Path, method: str) -> dict:
    run_worker("tasks.models.workers.init_adapter", step0_job(base), folder / "step0")
    job = job_on(base, folder, method=method, dropout=0.0, max_steps=None, precision="auto")
    write_rows(job.train, toy_rows(80))
    write_rows(job.validation, toy_rows(6, first=200))
    return run_worker("tasks.training.workers.train_adapter", job, folder / "out")


@pytest.fixture(scope="module", params=["lora", "qlora"])
def report(request, tiny_base, tmp_path_factory) -> dict:
    return train(tiny_base, tmp_path_factory.mktemp(request.param), request.param)


def test_it_trains_on_the_gpu_and_says_which(report):
    assert report["device"] == "cuda", report["device_reason"]
    assert torch.cuda.get_device_name() in report["device_reason"]


def test_it_computes_in_bf16_exactly_where_the_gpu_has_it(report):
    expected = "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp32"
    assert report["precision"] == expected, report["precision_reason"]


def test_packed_losses_equal_the_padded_ones_on_the_gpu(report):
    assert report["scoring"] == "packed", report["scoring_reason"]


def test_an_arm_learns_on_the_gpu(report):
    losses = [point["loss_nats"] for point in report["loss"]]
    assert losses[-1] < losses[0] - 0.1, (
        f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} steps"
    )


def test_weights_adapters_and_states_take_the_planned_device_memory(report):
    found, planned = report["measured_memory"], report["planned_memory"]
    assert sum(found.values()) == report["peak_train_bytes"], "the parts do not add up to the peak"
    for part in ("weights", "adapters", "optimiser"):
        assert found[part] == pytest.approx(planned[part], rel=0.02), f"{part} differ from the plan"
    assert found["process"] < 2**20, "there were tensors on the device before the base was loaded"
    assert found["rest"] > 0, "activations and logits cannot take less than nothing"
