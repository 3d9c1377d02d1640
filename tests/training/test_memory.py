"""The memory formulas against real tensors: small models, quantised, adapted and trained on this CPU.

Run: pytest tests/training/test_memory.py
"""

import dataclasses
import json
import weakref
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import (
    Adafactor,
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
)

import data_contracts
from data_contracts.train_spec import TrainSpec
from tasks.models.core.packing import ScoredSequence, pack
from tasks.models.workers.fused_layers import fuse_lora, fuse_mlp, fuse_norms
from tasks.models.workers.head_loss import HeadLoss
from tasks.models.workers.loading import load_base
from tasks.models.workers.pissa_olora_loftq import take_off_start
from tasks.models.workers.scoring import choose_way, scored_losses, to_tensors
from tasks.runtime.workers.device import Device
from tasks.training.core.activations import block_bytes, logit_bytes
from tasks.training.core.architecture import Architecture, decoder
from tasks.training.core.memory import constant_bytes, predict
from tasks.training.core.memory_settings import OPTIMISERS, Settings, Stack, StepShape, on_cpu, settings_of, state_bytes
from tasks.training.workers.describe_base import architecture_of
from tasks.training.workers.planned_memory import planned_memory
from tests.support.faults import job_on

CPU = Device("cpu", "fp32", "test", 1, "test")
SHAPES = json.loads((Path(data_contracts.__file__).parent / "architectures.json").read_text())
SMALL = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 1000,
}  # fmt: skip
CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "gemma": GemmaConfig, "qwen2": Qwen2Config}
SETTINGS = TrainSpec(rank=8)
PRECISIONS = ["fp32", pytest.param("bf16", marks=pytest.mark.slow)]  # without AVX512 bf16 takes eight times as long


def small_config(name: str):
    head_dim = {"head_dim": 32} if name == "gemma" else {}
    return CONFIGS[name](**SMALL, **head_dim, use_cache=False)


def settings(method: str, **changes) -> Settings:
    return settings_of(with_changes(changes), method, 4, StepShape(64))


def with_changes(changes: dict) -> TrainSpec:
    return TrainSpec.model_validate(SETTINGS.model_dump() | changes)


@pytest.fixture(scope="module", params=CONFIGS)
def base(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(small_config(request.param)).save_pretrained(folder)
    return folder


# --- static -------------------------------------------------------------------------------------------------


def tensor_bytes(model: torch.nn.Module) -> tuple[int, int]:
    """(weights, quantisation constants) as they are in memory."""
    weights, constants = {}, {}
    for parameter in model.parameters():
        weights[parameter.data_ptr()] = parameter.numel() * parameter.element_size()
        if state := getattr(parameter, "quant_state", None):
            kept = [state.absmax, state.code]
            kept += [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
            constants |= {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in kept}
    return sum(weights.values()), sum(constants.values())


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_base_takes_the_planned_bytes(base, method):
    model = load_base(base, method, CPU)
    parts = predict(architecture_of(model), settings(method))
    weights, constants = tensor_bytes(model)
    assert parts.weights == pytest.approx(weights, rel=0.001)
    # bitsandbytes shares code books between tensors, or not, by version: 1 % of the whole.
    assert parts.weights + parts.constants == pytest.approx(weights + constants, rel=0.01)


def test_a_quantised_model_describes_itself_as_its_configuration_does(base):
    config = load_base(base, "lora", CPU).config
    with torch.device("meta"):
        unloaded = AutoModelForCausalLM.from_config(config)
    assert architecture_of(load_base(base, "qlora", CPU)) == architecture_of(unloaded)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(256, 704), (100, 100), (1024, 1024)])
def test_constants_of_one_tensor_are_those_of_bitsandbytes(shape, double_quant):
    packed, state = bnb.functional.quantize_4bit(
        torch.randn(shape), blocksize=64, compress_statistics=double_quant, quant_type="nf4"
    )
    kept = [state.absmax, state.code]
    kept += [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    assert constant_bytes(shape[0] * shape[1], double_quant=double_quant) == sum(
        t.numel() * t.element_size() for t in kept
    )
    assert packed.numel() == -(-shape[0] * shape[1] // 2)


def test_double_quantisation_takes_an_eighth_of_a_bit_for_each_weight():
    weights = 4096 * 4096
    assert 8 * constant_bytes(weights, double_quant=False) / weights == pytest.approx(0.5, abs=0.001)
    assert 8 * constant_bytes(weights, double_quant=True) / weights == pytest.approx(0.127, abs=0.001)


def test_llama_2_7b_takes_what_was_measured():
    """3.60 GiB as NF4 with double quantisation, 4.24 after the upcast and rank-16 adapters (facts: Manning, 8.4)."""
    arch = decoder(SHAPES["llama-2-7b"])
    plain = predict(arch, Settings("qlora", 512))
    upcast = predict(arch, Settings("qlora", 512, stack=Stack(kbit_upcast=True)))
    assert (plain.weights + plain.constants) / 2**30 == pytest.approx(3.60, abs=0.01)
    assert (upcast.weights + upcast.constants + upcast.adapters) / 2**30 == pytest.approx(4.24, abs=0.01)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_adapters_have_the_planned_parameters(base, targets):
    model = load_base(base, "lora", CPU)
    arch = architecture_of(model)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=targets))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    planned = predict(arch, settings("lora", target_modules=targets))
    assert planned.adapters == sum(p.numel() * p.element_size() for p in trained) > 0


CLASSES = {
    "adamw_torch": torch.optim.AdamW,
    "adamw_8bit": bnb.optim.AdamW8bit,
    "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
    "paged_adamw_32bit": bnb.optim.PagedAdamW32bit,
    "lion_8bit": bnb.optim.Lion8bit,
    "adafactor": lambda params: Adafactor(params, lr=1e-3, relative_step=False, scale_parameter=False),
}


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", CLASSES)
def test_optimiser_states_take_the_planned_bytes(name):
    shapes = [(8, 2048), (2048, 8), (8, 100), (512, 512)]
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimiser = CLASSES[name](params)
    for parameter in params:
        parameter.grad = torch.randn_like(parameter)
    optimiser.step()
    kept = {
        tensor.data_ptr(): tensor.numel() * tensor.element_size()
        for state in optimiser.state.values()
        for tensor in state.values()
        if isinstance(tensor, torch.Tensor) and tensor.numel() > 1
    }
    assert state_bytes(name, shapes, parameter_bytes=4)[0] == sum(kept.values())


def test_only_large_states_of_paged_optimisers_may_leave_the_card():
    assert state_bytes("paged_adamw_32bit", [(8, 1000)], 4)[1] == 0
    assert state_bytes("paged_adamw_32bit", [(512, 512)], 4)[1] == 2 * 4 * 512 * 512
    assert state_bytes("adamw_8bit", [(512, 512)], 4)[1] == 0
    assert all(state_bytes(name, [(8, 64)], 4)[0] >= 0 for name in OPTIMISERS)


# --- activations --------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make and that are still alive, and their peak."""

    def __init__(self, known) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.sizes: dict[int, int] = {}
        self.known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage) -> None:
        key = storage._cdata
        if key not in self.sizes and key not in self.known:
            self.sizes[key] = storage.nbytes()
            self.live += self.sizes[key]
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.live -= self.sizes.pop(key, 0)


def adapted_model(base: Path, method: str, checkpointing: bool, device: Device, **settings):
    model = load_base(base, method, device)
    arch = architecture_of(model)
    model = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", **{"r": 8, "target_modules": "all-linear"} | settings)
    )
    if checkpointing:
        model.enable_input_require_grads()
        model.activation_checkpointing_enable({"use_reentrant": False})
    fuse_lora(model)
    fuse_mlp(model)
    fuse_norms(model)
    return model.train(), arch


def live_peak(model, batch: dict, device: Device) -> int:
    known = [*model.parameters(), *model.buffers(), *(t for t in batch.values() if isinstance(t, torch.Tensor))]
    with LiveBytes(known) as counter:
        with torch.autocast("cpu", torch.bfloat16, enabled=device.precision == "bf16"):
            losses = scored_losses(model, batch)
        losses.sum().backward()
    return counter.peak


def packed_settings(rows: list[ScoredSequence], method: str, device: Device, **changes) -> Settings:
    packed = pack(rows)
    shape = StepShape(len(packed.input_ids_T), scored=len(packed.targets_N), segments=packed.tree.seen)
    return on_cpu(settings_of(with_changes(changes), method, device.dtype.itemsize, shape))


def planned_peak(arch: Architecture, asked: Settings) -> int:
    parts = predict(arch, asked)
    return parts.activations + parts.logits + parts.gradients


APART = [ScoredSequence(list(range(i, i + 400)), 250) for i in (0, 500)]
SHARED = [ScoredSequence([7] * 40 + list(range(i, i + n)), n) for i, n in ((0, 200), (300, 333), (700, 120))]


@pytest.mark.parametrize("rows", [APART, SHARED], ids=["apart", "shared"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_packed_training_step_peaks_within_1_percent_of_the_plan(base, method, checkpointing, precision, rows):
    device = dataclasses.replace(CPU, precision=precision)
    model, arch = adapted_model(base, method, checkpointing, device)
    asked = packed_settings(rows, method, device, activation_checkpointing=checkpointing)
    assert planned_peak(arch, asked) == pytest.approx(live_peak(model, to_tensors(rows), device), rel=0.01)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "gate_proj", "up_proj"]])
def test_layers_without_an_adapter_keep_no_input(base, targets):
    model, arch = adapted_model(base, "lora", False, CPU, target_modules=targets)
    asked = packed_settings(SHARED, "lora", CPU, target_modules=targets)
    assert planned_peak(arch, asked) == pytest.approx(live_peak(model, to_tensors(SHARED), CPU), rel=0.01)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_with_dropout_peaks_within_12_percent_of_the_plan(base, precision):
    """PEFT's own forward; a CPU keeps dropout's noise in fp32."""
    device = dataclasses.replace(CPU, precision=precision)
    model, arch = adapted_model(base, "lora", False, device, lora_dropout=0.1)
    asked = packed_settings(SHARED, "lora", device, dropout=0.1)
    assert planned_peak(arch, asked) == pytest.approx(live_peak(model, to_tensors(SHARED), device), rel=0.12)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_start_that_is_taken_off_peaks_within_3_percent_of_the_plan(base, precision):
    device = dataclasses.replace(CPU, precision=precision)
    model, arch = adapted_model(base, "lora", False, device, init_lora_weights=False)
    take_off_start(model)
    fuse_lora(model)
    asked = packed_settings(SHARED, "lora", device, init="pissa")
    assert planned_peak(arch, asked) == pytest.approx(live_peak(model, to_tensors(SHARED), device), rel=0.03)


@pytest.mark.parametrize(("precision", "off"), [("fp32", 0.02), pytest.param("bf16", 0.2, marks=pytest.mark.slow)])
def test_a_step_of_full_tuning_peaks_near_the_plan(base, precision, off):
    """In bf16 the residual stream stays fp32, which the plan leaves out."""
    device = dataclasses.replace(CPU, precision=precision)
    model = load_base(base, "full", device, trains_all=True)
    arch, asked = architecture_of(model), packed_settings(SHARED, "full", device)
    assert planned_peak(arch, asked) == pytest.approx(live_peak(model, to_tensors(SHARED), device), rel=off)
    assert predict(arch, asked).weights == 4 * arch.parameters


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_of_prefix_tuning_peaks_within_6_percent_of_the_plan(base, precision):
    device = dataclasses.replace(CPU, precision=precision)
    model = load_base(base, "prefix", device)
    arch = architecture_of(model)
    model = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=16))
    fuse_norms(model)
    rows = [ScoredSequence(list(range(i, i + 200)), 100) for i in (0, 100, 200, 300)]
    asked = settings_of(SETTINGS, "prefix", device.dtype.itemsize, StepShape(199, len(rows), 400))
    assert sum(a * b for a, b in asked.trainable(arch)) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    measured = live_peak(model, to_tensors(rows, "padded"), device)
    assert planned_peak(arch, asked) == pytest.approx(measured, rel=0.06)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_padded_step_of_a_base_with_softcaps_peaks_within_12_percent_of_the_plan(tmp_path, precision, checkpointing):
    config = Gemma2Config(**SMALL, head_dim=32, use_cache=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    device = dataclasses.replace(CPU, precision=precision)
    model, arch = adapted_model(tmp_path, "lora", checkpointing, device)
    rows = [ScoredSequence(list(range(i, i + 200)), 100) for i in (0, 100, 200, 300)]
    assert choose_way(model, rows[:1], 64).way == "padded"
    train = with_changes({"activation_checkpointing": checkpointing})
    asked = settings_of(train, "lora", device.dtype.itemsize, StepShape(199, len(rows), 400, way="padded"))
    measured = live_peak(model, to_tensors(rows, "padded"), device)
    assert planned_peak(arch, asked) == pytest.approx(measured, rel=0.12)


def test_logits_take_one_block_however_many_tokens_are_scored():
    """Qwen2.5's vocabulary: 32 MiB for logits in their three formats, and the scored hidden states four times."""
    arch = decoder(SHAPES["qwen2.5-7b"])
    for scored in (4000, 20_000):
        hidden = 2 * 2 * scored * arch.hidden + (4 + 2) * 2048 * arch.hidden
        assert logit_bytes(arch, Settings("lora", 32_768, scored=scored)) - hidden == 2**25
    changed = dataclasses.replace(arch, logits_changed=True)
    assert logit_bytes(changed, Settings("lora", 32_768, scored=1000)) == 12 * 1000 * arch.vocab


def test_the_loss_holds_the_logits_of_one_block_only(monkeypatch):
    monkeypatch.setattr("tasks.models.workers.head_loss.BLOCK_ROWS", 100)
    monkeypatch.setattr("tasks.models.workers.head_loss.BLOCK_COLUMNS", 500)
    hidden, weight = torch.randn(250, 16, requires_grad=True), torch.randn(1000, 16)
    with LiveBytes([hidden, weight]) as counter:
        HeadLoss.apply(hidden, weight, torch.arange(250))
    assert 4 * 100 * 500 <= counter.peak < 4 * 100 * 750


def test_with_checkpointing_every_blocks_input_and_one_whole_block_are_alive_at_once():
    arch = decoder(SHAPES["llama-2-7b"])
    asked = Settings("lora", 1024, scored=16, checkpointing=True)
    parts = predict(arch, asked)
    inputs = arch.layers * 1024 * arch.hidden * 2
    block = block_bytes(arch, asked)
    assert parts.moment == "first block backward"
    assert inputs + block < parts.activations < inputs + 2 * block


def test_scores_of_every_pair_of_tokens_are_what_eager_attention_costs():
    arch = decoder(SHAPES["llama-2-7b"])
    flash, eager = (
        predict(arch, Settings("lora", 4096, stack=Stack(eager_attention=eager))) for eager in (False, True)
    )
    scores = arch.layers * arch.heads * 4096 * 4096 * (4 + 2)
    assert eager.activations - flash.activations == scores


# --- predicted, in a run ------------------------------------------------------------------------------------

ROWS = [ScoredSequence([7] * 5 + list(range(i, i + n)), 10) for i, n in ((0, 20), (50, 300), (400, 30), (500, 310))]


def test_the_largest_step_of_a_plan_is_the_one_predicted(base):
    job = job_on(base, base, rank=8, dropout=0.0)
    small, large, whole = (
        planned_memory(job, ROWS, plan, CPU, "packed") for plan in ([[0], [2]], [[1, 3]], [[0], [1, 3], [2]])
    )
    assert sum(small.values()) < sum(large.values())
    assert large == whole
    parts = predict(
        architecture_of(load_base(base, "lora", CPU)), packed_settings([ROWS[1], ROWS[3]], "lora", CPU), "cpu"
    )
    assert sum(whole.values()) == parts.total
    assert [whole[name] for name in ("weights", "optimiser", "logits")] == [
        parts.weights,
        parts.optimiser,
        parts.logits,
    ]


@pytest.mark.parametrize(("config", "settings", "why"), [
    (MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=100), {}, "it has no attention heads"),
    (LlamaConfig(**SMALL), {"optimizer": "apollo_adamw"}, "apollo_adamw: its states are not known here"),
    (LlamaConfig(**SMALL), {"use_dora": True}, "DoRA's memory is not planned"),
])  # fmt: skip
def test_what_cannot_be_planned_is_noted_and_stops_nothing(tmp_path, capsys, config, settings, why):
    config.save_pretrained(tmp_path)
    job = job_on(tmp_path, tmp_path, **settings)
    assert planned_memory(job, ROWS, [[0]], CPU, "packed") is None
    assert json.loads(capsys.readouterr().out) == {"event": "note", "text": f"memory of training is not planned: {why}"}
