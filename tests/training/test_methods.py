"""Every method trains through the real worker and comes back as it was. Run: pytest tests/training/test_methods.py"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_contracts.errors import ConfigError
from data_contracts.jobs.evaluation import AdaptedModel
from data_contracts.jobs.models import InitAdapterJob
from data_contracts.jobs.training import TrainJob
from data_contracts.reports import Quantisation
from data_contracts.train_spec import TrainSpec
from flows.config.load import load_spec
from tasks.models.base import start_settings
from tasks.models.core.packing import ScoredSequence
from tasks.models.workers.chat_template import load_chat
from tasks.models.workers.forms import attach_adapter, form_of, load_form
from tasks.models.workers.fused_layers import fuse_lora
from tasks.models.workers.init_adapter import make_step0
from tasks.models.workers.loading import QLORA, dequantised, load_base
from tasks.models.workers.pissa_olora_loftq import adapted
from tasks.models.workers.scoring import scored_losses, to_tensors
from tasks.release.registry import _quantisation
from tasks.runtime.store import digest
from tasks.training.workers import train_adapter
from tasks.training.workers import trainer as packed_trainer
from tasks.training.workers.neftune import add_noise, lengths_of
from tests.conftest import toy_rows, write_rows
from tests.support.devices import CPU

# As in a worker, where harness.py silences the deprecation warnings of libraries.
pytestmark = pytest.mark.filterwarnings("ignore")

SHORT = {
    "rank": 4, "alpha": 8, "learning_rate": 1e-2, "max_steps": 6, "batch_tokens": 256, "max_tokens": 256,
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
FIRST = (
    "lora",
    "qlora nf4",
    "full",
    "prefix",
    "pissa, 4 bits",
)  # the others: `pytest -m slow tests/training/test_methods.py`


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("rows")
    return {
        "train": write_rows(folder / "train.jsonl", toy_rows(40)),
        "validation": write_rows(folder / "validation.jsonl", toy_rows(6, first=200)),
    }


def job_of(base: Path, files: dict[str, Path], method: str, changes: dict, out: Path) -> TrainJob:
    """The training worker's job, with the step-0 adapter made as the pipeline makes it."""
    train = TrainSpec(methods=[method], **SHORT | changes)
    start = start_settings(method, 5, train, "fp32")
    if start:
        make_step0(InitAdapterJob(base=base, settings=start), out / "step0")
    return TrainJob(
        method=method, seed=5, base=base, base_name="tiny", step0=out / "step0" / "adapter" if start else None,
        precision="fp32", threads_reason=None, settings=train, **files,
    )  # fmt: skip


def loaded(base: Path, job: TrainJob, adapter: Path, report: dict):
    """What the evaluation scores: the saved result in a model of its own."""
    quantisation = Quantisation(**report["quantisation"]) if report["quantisation"] else QLORA
    model = load_base(adapter if job.is_full else base, job.method, CPU, quantisation)
    target = AdaptedModel(method=job.method, adapter_folder=str(adapter), quantisation=None, merged=False)
    return attach_adapter(model, target)


def losses_of(model, base: Path, way: str = "padded") -> torch.Tensor:
    chat = load_chat(base)
    rows = [chat.scored(row["messages"]) for row in toy_rows(5, first=300)]
    with torch.inference_mode():
        return scored_losses(model.eval(), to_tensors(rows, way))


@pytest.mark.parametrize("variant", [v if v in FIRST else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS])
def test_a_method_learns_and_reloads_as_the_model_that_was_trained(tiny_base, files, tmp_path, monkeypatch, variant):
    method, changes = VARIANTS[variant]
    job = job_of(tiny_base, files, method, changes, tmp_path)
    trained = []
    save = train_adapter.save_trained
    monkeypatch.setattr(train_adapter, "save_trained", lambda model, *rest: (trained.append(model), save(model, *rest)))
    report = train_adapter.train(job, tmp_path)
    assert report["trainable_parameters"] == sum(p.numel() for p in trained[0].parameters() if p.requires_grad) > 0
    first, last = report["loss"][0]["loss_nats"], report["loss"][-1]["loss_nats"]
    assert last < first - 0.05
    way = report["scoring"]
    assert way == ("padded" if method == "prefix" else "packed")
    found = losses_of(loaded(tiny_base, job, tmp_path / "adapter", report), tiny_base, way)
    expected = losses_of(trained[0], tiny_base, way)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    base = losses_of(load_base(tiny_base, "lora", CPU), tiny_base)
    assert (found - base).mean() < -0.05
    # The same bytes in whatever order a process keeps its sets.
    for config in tmp_path.glob("**/adapter/adapter_config.json"):
        names = json.loads(config.read_text()).get("target_modules") or []
        assert names == sorted(names), config


@pytest.mark.parametrize("variant", FIRST)
def test_memory_is_counted_part_by_part_as_it_was_planned(tiny_base, files, tmp_path, variant):
    method, changes = VARIANTS[variant]
    job = job_of(tiny_base, files, method, {**changes, "max_steps": 1}, tmp_path)
    report = train_adapter.train(job, tmp_path)
    found, planned = report["measured_memory"], report["planned_memory"]
    assert sum(found.values()) == report["peak_train_bytes"]
    assert sum(planned.values()) == report["predicted_train_bytes"]
    for part in ("weights", "adapters", "optimiser"):
        assert found[part] == pytest.approx(planned[part], rel=0.02), part
    trained = report["trainable_parameters"] * 4
    assert report["gradients_bytes"] == trained
    assert (found["adapters"] == 0) == (method == "full")
    assert found["process"] > 100e6


# --- starts -------------------------------------------------------------------------------------------------


def step0_of(base: Path, method: str, changes: dict, out: Path) -> tuple[TrainJob, torch.nn.Module]:
    """A training worker's job, and its model before the first step."""
    job = job_of(base, dict.fromkeys(("train", "validation"), out / "none.jsonl"), method, changes, out)
    return job, train_adapter.trainable(job, CPU)


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_from_the_bases_own_parts_changes_nothing_at_step_0(tiny_base, tmp_path, method, init):
    _, model = step0_of(tiny_base, method, {"init": init}, tmp_path)
    parts = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert parts and all(float(p.detach().abs().max()) > 1e-3 for p in parts)
    expected = losses_of(load_base(tiny_base, method, CPU), tiny_base)
    for fuse in (False, True):
        assert not fuse or fuse_lora(model) == 14
        torch.testing.assert_close(losses_of(model, tiny_base), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("alpha", [4, 32])
def test_loftq_starts_nearer_to_the_full_base_whatever_the_scale(tiny_base, tmp_path, alpha):
    whole = dict(load_base(tiny_base, "lora", CPU).named_parameters())
    _, model = step0_of(tiny_base, "qlora", {"init": "loftq", "rank": 16, "alpha": alpha}, tmp_path)
    for name, layer in adapted(model):
        lost = whole[f"{name}.weight"] - dequantised(layer.get_base_layer().weight)
        assert (lost - layer.get_delta_weight("default")).norm() < 0.9 * lost.norm()


def test_a_rank_that_a_layer_does_not_have_is_refused_before_training(tiny_base, tmp_path):
    with pytest.raises(ConfigError, match="cannot make a rank of 4096"):
        step0_of(tiny_base, "lora", {"init": "olora", "rank": 4096}, tmp_path)


def test_lora_and_qlora_share_a_start_but_for_loftq():
    def start(method, **changes):
        return start_settings(method, 17, TrainSpec(methods=["lora", "qlora", "full", "prefix"], **changes), "fp32")

    assert start("full") is None
    assert start("lora", init="pissa") == start("qlora", init="pissa")
    assert start("lora", init="loftq").init == "default"
    assert start("qlora", init="loftq") != start("qlora", init="loftq", quant_type="fp4")
    assert start("prefix", rank=4) == start("prefix", rank=8) != start("prefix", prefix_tokens=3)


# --- while it trains ----------------------------------------------------------------------------------------

RESUMED = {
    "full": ("full", {"validation_steps": 2}), "prefix": ("prefix", {"learning_rate": 0.3}),
    "lora+ and dropout": ("lora", {"lora_plus_ratio": 4.0, "dropout": 0.1}), "neftune": ("qlora", {"neftune_alpha": 5.0}),
    "pissa": ("lora", {"init": "pissa", "validation_steps": 2}), "dora": ("lora", {"use_dora": True}),
}  # fmt: skip


@pytest.mark.parametrize("variant", [v if v == "dora" else pytest.param(v, marks=pytest.mark.slow) for v in RESUMED])
def test_an_interrupted_run_ends_with_the_bit_identical_result(tiny_base, files, tmp_path, monkeypatch, variant):
    job = job_of(tiny_base, files, *RESUMED[variant], tmp_path)
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    train_adapter.train(job, tmp_path / "whole")
    losses, calls = packed_trainer.scored_losses, iter(range(1000))

    def interrupted(model, batch):
        if torch.is_grad_enabled() and next(calls) == 4:
            raise KeyboardInterrupt
        return losses(model, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(packed_trainer, "scored_losses", interrupted)
        train_adapter.train(job, tmp_path / "cut")
    torch.manual_seed(99)
    assert train_adapter.train(job, tmp_path / "cut")["resumed_from_step"] in (3, 4)
    assert digest(tmp_path / "cut" / "adapter") == digest(tmp_path / "whole" / "adapter")


@pytest.mark.parametrize(("method", "file"), [("full", "model"), ("prefix", "adapter_model")])
def test_the_weights_of_the_lowest_validation_are_kept(tiny_base, files, tmp_path, monkeypatch, method, file):
    losses = iter([1.0, 2.0, 3.0, 3.0])
    monkeypatch.setattr(packed_trainer, "mean_loss", lambda *_: next(losses))
    report = train_adapter.train(job_of(tiny_base, files, method, {"validation_steps": 2}, tmp_path), tmp_path)
    assert (report["best_step"], report["steps"]) == (2, 6)
    kept, best, last = (
        load_file(tmp_path / folder / f"{file}.safetensors") for folder in ("adapter", "checkpoint-2", "checkpoint-6")
    )
    assert all(torch.equal(kept[name], best[name]) for name in best)
    assert not all(torch.equal(kept[name], last[name]) for name in last)


def test_loraplus_gives_b_its_own_rate_over_the_whole_schedule(tiny_base, files, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.optim.AdamW, "step", _noting_rates(torch.optim.AdamW.step, seen))
    train_adapter.train(job_of(tiny_base, files, "lora", {"lora_plus_ratio": 8.0}, tmp_path), tmp_path)
    assert len(seen) == 6
    assert all(rates == {"lora_A": pytest.approx(own), "lora_B": pytest.approx(8 * own)} for own, rates in seen)


def _noting_rates(step, seen):
    def noting(optimizer, *args, **kwargs):
        wide = {4: "lora_A"}  # A is [rank, inputs], B [outputs, rank]
        rates = {wide.get(p.shape[0], "lora_B"): g["lr"] for g in optimizer.param_groups for p in g["params"]}
        seen.append((optimizer.param_groups[0]["lr"], rates))
        return step(optimizer, *args, **kwargs)

    return noting


@pytest.mark.parametrize("way", ["packed", "padded"])
def test_noise_depends_on_a_sequences_own_length_and_only_in_training(tiny_base, way):
    chat, model = load_chat(tiny_base), load_base(tiny_base, "lora", CPU)
    rows = [chat.scored(row["messages"]) for row in toy_rows(3)]
    rows.append(ScoredSequence([9] * 150, 100))
    batch, seen = to_tensors(rows, way), []
    clean = losses_of(model, tiny_base)
    plain = model.get_input_embeddings()(batch["input_ids"])
    add_noise(model, alpha=5.0)
    model.get_input_embeddings().register_forward_hook(lambda *inputs: seen.append(inputs[-1]))
    torch.testing.assert_close(losses_of(model, tiny_base), clean)
    model.train()
    scored_losses(model, batch)
    noise = (seen[-1] - plain).abs()
    for row in rows:
        length = len(row.ids) - 1
        most = 5.0 / (length * plain.shape[-1]) ** 0.5
        is_own = lengths_of(batch).expand(noise.shape[:2]) == length
        assert 0.9 * most < float(noise[is_own].max()) <= most * 1.001


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "why"), [
    ({"methods": ["lora"], "quant_type": "fp4"}, "quant_type has an effect on qlora only"),
    ({"methods": ["full"], "double_quant": False}, "double_quant has an effect on qlora only"),
    ({"methods": ["full", "prefix"], "use_rslora": True}, "use_rslora has an effect on lora and qlora only"),
    ({"methods": ["prefix"], "use_dora": True}, "use_dora has an effect on lora and qlora only"),
    ({"methods": ["full"], "lora_plus_ratio": 16}, "lora_plus_ratio has an effect on lora and qlora only"),
    ({"methods": ["full"], "init": "pissa"}, "init has an effect on lora and qlora only"),
    ({"methods": ["full"], "dropout": 0.1}, "dropout has an effect on lora and qlora only"),
    ({"methods": ["lora"], "prefix_tokens": 8}, "prefix_tokens has an effect on prefix only"),
    ({"methods": ["lora"], "learning_rates": {"full": 1e-5}}, "full, which is no arm of this run"),
    ({"methods": ["lora", "lora"]}, "names an arm twice"),
    ({"methods": ["lora"], "init": "loftq"}, "no arm is quantised"),
    ({"use_dora": True, "init": "pissa"}, "takes its magnitudes from the untouched base"),
    ({"methods": ["lora", "prefix"], "activation_checkpointing": True}, "which activation_checkpointing drops"),
    ({"lora_plus_ratio": 16, "optimizer": "galore_adamw"}, "sorts the weights itself"),
    ({"early_stopping_patience": 2}, "set validation_steps too"),
])  # fmt: skip
def test_settings_that_cannot_work_together_are_refused_with_the_reason(settings, why):
    with pytest.raises(ValueError, match=why):
        TrainSpec(**settings)


def test_all_refusals_are_reported_at_once():
    asked = ["train.methods=[prefix]", "train.use_dora=true", "train.activation_checkpointing=true"]
    with pytest.raises(ConfigError) as refused:
        load_spec("smoke", asked)
    assert [(p.where, p.limit.partition(" ")[0]) for p in refused.value.problems] == [
        ("train.methods (--set), train.use_dora (--set)", "use_dora"),
        ("train.activation_checkpointing (--set)", "prefix"),
    ]
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_base_is_quantised_as_asked_where_it_is_trained_scored_and_served(
    tiny_base, tmp_path, quant_type, double_quant
):
    asked = {"quant_type": quant_type, "double_quant": double_quant}
    from tasks.release.workers.served_model import ServedModel  # MLflow warns of type hints as it is imported

    job, model = step0_of(tiny_base, "qlora", asked, tmp_path)
    assert quantised_as(model) == asked == train_adapter.quantisation_of(job).model_dump()
    target = AdaptedModel(method="qlora", adapter_folder=None, quantisation=asked, merged=False)
    assert quantised_as(load_form(form_of(target), tiny_base, CPU)) == asked
    served = ServedModel()
    served.meta = {"precision": "fp32", "quantisation": asked}
    form = served._form()["quantization_config"]
    assert {"quant_type": form.bnb_4bit_quant_type, "double_quant": form.bnb_4bit_use_double_quant} == asked


def quantised_as(model) -> dict:
    (state,) = {
        (p.quant_state.quant_type, p.quant_state.nested) for p in model.parameters() if hasattr(p, "quant_state")
    }
    return {"quant_type": state[0], "double_quant": state[1]}


def test_a_version_says_how_its_base_was_quantised_and_an_old_one_as_it_was():
    tags = {"tunegate.method": "qlora", "tunegate.quantisation": '{"quant_type":"fp4","double_quant":false}'}
    assert _quantisation(tags).model_dump() == {"quant_type": "fp4", "double_quant": False}
    assert _quantisation({"tunegate.method": "qlora"}) == QLORA
    assert _quantisation({"tunegate.method": "full"}) is None
