"""Every method trains through the real worker and comes back as it was. Run: pytest tests/test_methods.py"""

from pathlib import Path

import pytest
import torch

from data_contracts.run_spec import TrainSpec
from tasks.base import start_dials
from tasks.workers import train_adapter
from tasks.workers.bases import load_base
from tasks.workers.chat import load_chat
from tasks.workers.device import Device
from tasks.workers.evaluate_models import attach
from tasks.workers.init_adapter import init_adapter
from tasks.workers.scoring import scored_losses, to_tensors
from tests.conftest import toy_rows, write_rows

# As in a worker, where harness.py silences what libraries say about their own future.
pytestmark = pytest.mark.filterwarnings("ignore")

CPU = Device("cpu", "fp32", "test", 1, "test")
SHORT = {
    "rank": 4, "alpha": 8, "seed": 5, "learning_rate": 1e-2, "max_steps": 6, "batch_tokens": 256, "max_tokens": 256,
    "epochs": 2, "checkpoint_steps": 3, "threads": 1,
}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict]] = {
    "lora": ("lora", {}),
    "qlora nf4": ("qlora", {}),
    "qlora nf4, single": ("qlora", {"double_quant": False}),
    "qlora fp4": ("qlora", {"quant_type": "fp4"}),
    "full": ("full", {}),
    "prefix": ("prefix", {"prefix_tokens": 8, "learning_rate": 0.3}),
    "rslora": ("lora", {"use_rslora": True}),
    "dora": ("lora", {"use_dora": True}),
    "dora, 4 bits": ("qlora", {"use_dora": True}),
    "pissa": ("lora", {"init": "pissa"}),
    "pissa, 4 bits": ("qlora", {"init": "pissa"}),
    "pissa, rslora": ("lora", {"init": "pissa", "use_rslora": True}),
    "pissa, dropout": ("lora", {"init": "pissa", "dropout": 0.1}),
    "olora": ("lora", {"init": "olora"}),
    "olora, 4 bits": ("qlora", {"init": "olora"}),
    "loftq": ("qlora", {"init": "loftq"}),
    "loftq, fp4": ("qlora", {"init": "loftq", "quant_type": "fp4"}),
    "lora+": ("lora", {"lora_plus_ratio": 4.0}),
    "neftune": ("lora", {"neftune_alpha": 5.0}),
    "neftune, full": ("full", {"neftune_alpha": 5.0}),
    "neftune, prefix": ("prefix", {"neftune_alpha": 5.0, "learning_rate": 0.3}),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("rows")
    return {
        "train": str(write_rows(folder / "train.jsonl", toy_rows(40))),
        "validation": str(write_rows(folder / "validation.jsonl", toy_rows(6, first=200))),
    }


def spec_of(base: Path, files: dict[str, str], method: str, changes: dict, out: Path) -> dict:
    """The training worker's spec, with the step-0 adapter made as the pipeline makes it."""
    train = TrainSpec(methods=[method], **SHORT | changes)
    start = start_dials(method, train, "fp32")
    if start:
        init_adapter(start | {"base": str(base)}, out / "step0")
    step0 = str(out / "step0" / "adapter") if start else None
    own = {"method": method, "base": str(base), "base_name": "tiny", "precision": "fp32", "step0": step0}
    return train.model_dump() | own | files


def loaded(base: Path, spec: dict, adapter: Path, report: dict):
    """What the evaluation scores: the saved result in a model of its own."""
    own = spec["method"] == "full"
    quantisation = report["quantisation"] or {}
    model = load_base(adapter if own else base, spec["method"], CPU, quantisation)
    return attach(model, {"method": spec["method"], "adapter": str(adapter)})


def losses_of(model, base: Path, way: str = "padded") -> torch.Tensor:
    chat = load_chat(base)
    rows = [chat.scored(row["messages"]) for row in toy_rows(5, first=300)]
    with torch.inference_mode():
        return scored_losses(model.eval(), to_tensors(rows, way))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_method_learns_and_reloads_as_the_model_that_was_trained(tiny_base, files, tmp_path, monkeypatch, variant):
    method, changes = VARIANTS[variant]
    spec = spec_of(tiny_base, files, method, changes, tmp_path)
    trained = []
    save = train_adapter.save
    monkeypatch.setattr(train_adapter, "save", lambda model, *rest: (trained.append(model), save(model, *rest)))
    report = train_adapter.train(spec, tmp_path)
    first, last = report["loss"][0]["loss_nats"], report["loss"][-1]["loss_nats"]
    assert last < first - 0.05
    way = report["scoring"]
    assert way == ("padded" if method == "prefix" else "packed")
    found = losses_of(loaded(tiny_base, spec, tmp_path / "adapter", report), tiny_base, way)
    expected = losses_of(trained[0], tiny_base, way)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    base = losses_of(load_base(tiny_base, "lora", CPU), tiny_base)
    assert (found - base).mean() < -0.05
