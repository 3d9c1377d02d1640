"""The same worker on a CUDA device: NF4 trains, in bf16 where the device has it. Run: REQUIRE_GPU=1 pytest -m gpu"""

import os

import pytest
import torch

from tasks.processes import run_worker
from tests.conftest import LORA, toy_rows, write_rows
from tests.test_workers import DIALS

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_cuda():
    if torch.cuda.is_available():
        return
    if os.environ.get("REQUIRE_GPU") == "1":
        pytest.fail("REQUIRE_GPU=1, and torch finds no CUDA device")
    pytest.skip("torch finds no CUDA device")


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_an_arm_learns_on_the_gpu(tiny_base, tmp_path, method):
    step0 = {"base": str(tiny_base), "seed": 5, "rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear"}
    run_worker("tasks.workers.init_adapter", step0 | LORA, tmp_path / "step0")
    spec = DIALS | {"method": method, "base": str(tiny_base), "step0": str(tmp_path / "step0" / "adapter")}
    spec |= {"precision": "auto", "train": str(write_rows(tmp_path / "train", toy_rows(80)))}
    spec |= {"validation": str(write_rows(tmp_path / "validation", toy_rows(6, first=200)))}
    report = run_worker("tasks.workers.train_adapter", spec, tmp_path / "out")
    assert report["device"] == "cuda"
    assert report["loss"][-1]["loss_nats"] < report["loss"][0]["loss_nats"]
    assert 0 < report["weights_bytes"] < report["peak_train_bytes"]
