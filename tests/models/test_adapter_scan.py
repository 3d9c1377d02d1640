"""An adapter is loaded only if it can be nothing else than an adapter: every fault has its test, and the rest is
fuzzed.

    TUNEGATE_FUZZ_CASES=20000 pytest tests/models/test_adapter_scan.py      a long run

The adapter has the files that PEFT 0.21.2 writes for tiny-llama's layers; what PEFT writes of every method is scanned
in tests/training/test_methods.py, whose models are loaded through the scan. No torch here.
"""

import json
import os
import random
import resource
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tasks.models.core.adapter_files import CONFIG, INDEX, WEIGHTS, scan_adapter, scan_weights, weight_faults
from tasks.models.core.adapter_scan import config_faults, index_faults
from tests.support.mutations import mutate_bytes, mutate_json

CASES = int(os.environ.get("TUNEGATE_FUZZ_CASES", "600"))
SEED = int(os.environ.get("TUNEGATE_FUZZ_SEED", "11"))
RANK = 4
LAYERS = {
    f"model.layers.{number}.{part}": sides
    for number in range(2)
    for part, sides in {
        "self_attn.q_proj": (128, 128),
        "self_attn.v_proj": (128, 64),
        "mlp.down_proj": (256, 128),
    }.items()
} | {"model.embed_tokens": (258, 128), "lm_head": (128, 258)}
TARGETS = ["q_proj", "v_proj", "down_proj"]
OFF = [
    "alora_invocation_tokens", "arrow_config", "auto_mapping", "corda_config", "eva_config", "exclude_modules",
    "kasa_config", "layer_replication", "layers_pattern", "layers_to_transform", "lora_ga_config", "megatron_config",
    "modules_to_save", "monteclora_config", "revision", "target_parameters", "trainable_token_indices", "use_bdlora",
    "velora_config",
]  # fmt: skip
LORA = dict.fromkeys(OFF) | {
    "alpha_pattern": {}, "base_model_name_or_path": "builtin:tiny-llama", "bias": "none", "ensure_weight_tying": False,
    "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "loftq_config": {}, "lora_alpha": 8,
    "lora_bias": False, "lora_dropout": 0.0, "megatron_core": "megatron.core", "peft_type": "LORA",
    "peft_version": "0.21.2", "qalora_group_size": 16, "r": RANK, "rank_pattern": {}, "target_modules": TARGETS,
    "task_type": "CAUSAL_LM", "use_dora": False, "use_qalora": False, "use_rslora": False,
}  # fmt: skip
PREFIX = {
    "auto_mapping": None, "base_model_name_or_path": "tiny", "encoder_hidden_size": 128, "inference_mode": True,
    "init_weights": None, "modules_to_save": None, "num_attention_heads": 2, "num_layers": 2, "num_transformer_submodules": 1,
    "num_virtual_tokens": 8, "peft_type": "PREFIX_TUNING", "peft_version": "0.21.2", "prefix_projection": False,
    "revision": None, "task_type": "CAUSAL_LM", "token_dim": 64,
}  # fmt: skip
Weights = dict[str, np.ndarray]


def lora_weights() -> Weights:
    draw = np.random.default_rng(0)
    found: Weights = {}
    for layer, (inputs, outputs) in LAYERS.items():
        if layer.rpartition(".")[2] in TARGETS:
            name = f"base_model.model.{layer}"
            found[f"{name}.lora_A.weight"] = draw.normal(size=(RANK, inputs)).astype(np.float32)
            found[f"{name}.lora_B.weight"] = draw.normal(size=(outputs, RANK)).astype(np.float32)
    return found


def write(folder: Path, config: Any = LORA, weights: Weights | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(lora_weights() if weights is None else weights, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


@pytest.fixture
def adapter(tmp_path) -> Path:
    return write(tmp_path / "adapter")


def first(weights: Weights, ending: str) -> str:
    return next(name for name in weights if name.endswith(ending))


# --- what is sound ------------------------------------------------------------------------------------------


def test_an_adapter_as_peft_writes_it_is_sound_with_and_without_its_base(adapter):
    (adapter / "README.md").write_text("PEFT's own")
    assert scan_adapter(adapter) == scan_adapter(adapter, LAYERS) == []


def test_so_are_dora_half_precision_an_adapted_head_and_a_prefix(tmp_path):
    weights = lora_weights()
    for layer, (_, outputs) in LAYERS.items():
        if layer.rpartition(".")[2] in TARGETS:
            weights[f"base_model.model.{layer}.lora_magnitude_vector"] = np.ones(outputs, np.float16)
    assert scan_adapter(write(tmp_path / "dora", LORA | {"use_dora": True}, weights), LAYERS) == []
    head = {
        "base_model.model.lm_head.lora_A.weight": np.ones((RANK, 128), np.float32),
        "base_model.model.lm_head.lora_B.weight": np.ones((258, RANK), np.float32),
        "base_model.model.lm_head.base_layer.weight": np.ones((258, 128), np.float32),
    }
    adapted = LORA | {"target_modules": [*TARGETS, "lm_head"]}
    assert scan_adapter(write(tmp_path / "head", adapted, lora_weights() | head), LAYERS) == []
    prefix = {"prompt_embeddings": np.ones((8, 256), np.float32)}
    assert scan_adapter(write(tmp_path / "prefix", PREFIX, prefix), LAYERS) == []


# --- configuration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "ADALORA"}, "peft_type is ADALORA, not LORA or PREFIX_TUNING"),
        ({"peft_type": ["LORA"]}, "peft_type is a JSON list of 1"),
        ({"auto_mapping": {"base_model_class": "X", "parent_library": "os"}}, "auto_mapping is a JSON dict of 2"),
        ({"megatron_config": {"a": 1}}, "megatron_config is a JSON dict of 1: a setting that is not known must be off"),
        ({"megatron_core": "antigravity"}, "megatron_core is antigravity, not 'megatron.core'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is a JSON list of 1"),
        ({"layer_replication": [[0, 9]]}, "layer_replication is"),
        ({"rank_pattern": {".*": 9}}, "rank_pattern is"),
        ({"use_qalora": True}, "use_qalora is True"),
        ({"anything_new": 1}, "anything_new is 1: a setting that is not known must be off"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is pissa, not true or false"),
        ({"bias": "all"}, "bias is all, not 'none'"),
        ({"r": 0}, "r is 0, not a whole number from 1"),
        ({"r": 10**9}, "r is 1000000000"),
        ({"r": True}, "r is True"),
        ({"r": 4.0}, "r is 4.0"),
        ({"r": None}, "r is None"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf, not a finite number above 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_dropout": 1.5}, "lora_dropout is 1.5"),
        ({"target_modules": 7}, "target_modules is 7, not names of layers"),
        ({"target_modules": ["a" * 600]}, "target_modules is a JSON list of 1"),
        ({"task_type": "SEQ_CLS"}, "task_type is SEQ_CLS"),
        ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path is a JSON list of 1"),
        ({"\x1b[31mred\u202e": 1}, "\\x1b[31mred\\u202e is 1"),
    ],
)
def test_a_setting_that_would_run_or_change_something_else_is_refused(adapter, change, message):
    (adapter / CONFIG).write_text(json.dumps(LORA | change))
    (fault,) = scan_adapter(adapter, LAYERS)
    assert message in fault and fault.startswith(f"{CONFIG}: ")


def test_every_fault_of_a_configuration_is_told_at_once():
    faults = list(config_faults({"peft_type": "LORA", "r": 0, "auto_mapping": 1}))
    assert [fault.partition(" ")[0] for fault in faults] == ["lora_alpha", "target_modules", "r", "auto_mapping"]
    assert list(config_faults([1])) == ["is a JSON list, not an object"]


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[" * 100_000, '{"a":' * 5_000, "9" * 10_000, "\ufeff{}", "nan", '"x"', "\0"]
)
def test_what_is_no_json_object_is_refused(adapter, text):
    (adapter / CONFIG).write_text(text)
    (fault,) = scan_adapter(adapter)
    assert fault.startswith(f"{CONFIG}: is ")


# --- tensors ------------------------------------------------------------------------------------------------


def changed(weights: Weights, change: Callable[[Weights], Any]) -> Weights:
    change(weights)
    return weights


def rename(old: str, new: str) -> Callable[[Weights], Any]:
    def change(weights: Weights) -> None:
        name = next(name for name in weights if old in name)
        weights[name.replace(old, new)] = weights.pop(name)

    return change


def put(ending: str, values: np.ndarray) -> Callable[[Weights], Any]:
    return lambda weights: weights.__setitem__(first(weights, ending), values)


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename(f"{Q}.lora_A.weight", f"{Q}.lora_C.weight"), f"{Q}.lora_C.weight is no part of a LoRA adapter"),
        (rename("base_model.model.", "other."), f"other.{Q}.lora_A.weight is no part of a LoRA adapter"),
        (rename(f"{Q}.lora_A.weight", "../../etc/passwd"), "is no part of a LoRA adapter"),
        (lambda weights: weights.pop(first(weights, "lora_B.weight")), f"{Q}: lora_B.weight missing"),
        (put("q_proj.lora_A.weight", np.ones((8, 128), np.float32)), f"{Q}.lora_A.weight is [8, 128], not [4, 128]"),
        (put("q_proj.lora_B.weight", np.ones((128, 4), np.int32)), "is of type I32, not F32, BF16, F16"),
        (put("q_proj.lora_B.weight", np.ones((128, 4), np.float64)), "is of type F64"),
        (put("q_proj.lora_B.weight", np.ones((4, 128), np.float32)), f"{Q}.lora_B.weight is [4, 128]"),
        (put("q_proj.lora_B.weight", np.ones((), np.float32)), f"{Q}.lora_B.weight is []"),
        (lambda weights: weights.clear(), "it holds no LoRA tensor"),
        (
            lambda weights: weights.update(
                {f"base_model.model.{Q}.base_layer.weight": np.ones((128, 128), np.float32)}
            ),
            f"{Q}.base_layer.weight is no part of a LoRA adapter",
        ),
        (
            lambda weights: weights.update({f"base_model.model.{Q}.lora_magnitude_vector": np.ones(128, np.float32)}),
            "lora_magnitude_vector missing, or not wanted by its configuration",
        ),
    ],
)
def test_a_tensor_that_does_not_belong_there_is_refused_without_the_base_too(tmp_path, change, message):
    folder = write(tmp_path / "adapter", weights=changed(lora_weights(), change))
    assert any(message in fault for fault in scan_adapter(folder)), scan_adapter(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: [w.pop(name) for name in list(w) if f"{Q}." in name],
            f"{Q} is a target without tensors: PEFT would draw them at random",
        ),
        (put("q_proj.lora_A.weight", np.ones((4, 64), np.float32)), f"{Q}.lora_A.weight is [4, 64], not [4, 128]"),
        (
            lambda w: [
                w.update({name.replace("layers.0", "layers.7"): w.pop(name)}) for name in list(w) if f"{Q}." in name
            ],
            "model.layers.7.self_attn.q_proj is no layer of the base",
        ),
    ],
)
def test_what_fits_itself_but_not_the_base_is_refused_where_the_base_is_known(tmp_path, change, message):
    folder = write(tmp_path / "adapter", weights=changed(lora_weights(), change))
    assert scan_adapter(folder) == []
    assert any(message in fault for fault in scan_adapter(folder, LAYERS)), scan_adapter(folder, LAYERS)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"prompt_embeddings": np.ones((8, 255), np.float32)}, "prompt_embeddings is [8, 255], not [8, 256]"),
        ({"prompt_embeddings": np.ones((9, 256), np.float32)}, "prompt_embeddings is [9, 256], not [8, 256]"),
        ({"other": np.ones((8, 256), np.float32)}, "other is no part of a prefix"),
        ({}, "prompt_embeddings is missing"),
    ],
)
def test_a_prefix_is_one_tensor_of_its_configurations_size(tmp_path, weights, message):
    faults = scan_adapter(write(tmp_path / "prefix", PREFIX, weights))
    assert f"{WEIGHTS}: {message}" in faults


def test_an_embeddings_own_weights_have_the_size_of_the_embedding(tmp_path):
    head = {
        "base_model.model.lm_head.lora_A.weight": np.ones((RANK, 128), np.float32),
        "base_model.model.lm_head.lora_B.weight": np.ones((258, RANK), np.float32),
        "base_model.model.lm_head.base_layer.weight": np.ones((259, 128), np.float32),
    }
    folder = write(tmp_path / "head", LORA | {"target_modules": [*TARGETS, "lm_head"]}, lora_weights() | head)
    assert scan_adapter(folder, LAYERS) == [f"{WEIGHTS}: lm_head.base_layer.weight is [259, 128], not [258, 128]"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_number_that_is_none_is_found_wherever_it_stands(tmp_path, value, dtype):
    weights = {name: tensor.astype(dtype) for name, tensor in lora_weights().items()}
    name = first(weights, "layers.1.mlp.down_proj.lora_B.weight")
    weights[name][-1, -1] = value
    assert scan_adapter(write(tmp_path / "adapter", weights=weights)) == [f"{WEIGHTS}: {name} holds NaN or infinity"]


def test_bf16_is_read_without_torch_and_its_nan_found(tmp_path):
    folder = write(tmp_path / "adapter", weights={k: v.astype(np.float16) for k, v in lora_weights().items()})
    file = folder / WEIGHTS
    header, body = unpack(file.read_bytes())
    for name in header.keys() - {"__metadata__"}:
        header[name]["dtype"] = "BF16"
    file.write_bytes(pack(header, body))
    assert scan_adapter(folder, LAYERS) == []
    file.write_bytes(pack(header, body[:-2] + b"\xc0\x7f"))
    (fault,) = scan_adapter(folder, LAYERS)
    assert "holds NaN or infinity" in fault


def unpack(raw: bytes) -> tuple[dict, bytes]:
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8:end]), raw[end:]


def pack(header: Any, body: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + body


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["adapter_model.bin", "run.py", "x.pt", "training_args.bin", "model.safetensors", ".hidden"]
)
def test_a_file_that_is_no_part_of_an_adapter_is_refused(adapter, name):
    (adapter / name).write_bytes(b"")
    assert scan_adapter(adapter) == [f"{name!r} does not belong there: only JSON and safetensors are read"]


def test_links_folders_and_pipes_are_refused_and_nothing_waits_for_them(adapter, tmp_path):
    (tmp_path / "elsewhere").write_bytes((adapter / WEIGHTS).read_bytes())
    (adapter / WEIGHTS).unlink()
    (adapter / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    (adapter / CONFIG).unlink()
    os.mkfifo(adapter / CONFIG)
    (adapter / "code").mkdir()
    assert scan_adapter(adapter) == ["'adapter_config.json' is no plain file", "'adapter_model.safetensors' is a link", "'code' is a folder"]  # fmt: skip


def test_pickled_weights_in_the_adapters_place_are_never_looked_into(adapter):
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    assert scan_adapter(adapter) == [
        "'adapter_model.bin' does not belong there: only JSON and safetensors are read",
        f"{WEIGHTS} is missing",
    ]


BROKEN = {
    "empty": lambda raw: b"",
    "7 bytes": lambda raw: raw[:7],
    "half a header": lambda raw: raw[:40],
    "half its data": lambda raw: raw[: len(raw) // 2],
    "a byte too few": lambda raw: raw[:-1],
    "a byte too many": lambda raw: raw + b"x",
    "a header of 2^60 bytes": lambda raw: struct.pack("<Q", 2**60) + raw[8:],
    "a header of 2^64 - 1 bytes": lambda raw: b"\xff" * 8 + raw[8:],
    "a shape of 2^62": lambda raw: pack(
        {"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 8]}}, b"\0" * 8
    ),
    "offsets outside": lambda raw: pack({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}, b"\0" * 8),
    "a list": lambda raw: pack([1]),
    "deep": lambda raw: pack(b"[" * 1_000_000),
    "a pickle": lambda raw: b"\x80\x04\x95\x10\x00\x00\x00\x00" + raw,
    "a zip": lambda raw: b"PK\x03\x04" + raw,
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_cut_or_lies_about_itself_is_refused_at_once(adapter, name):
    file = adapter / WEIGHTS
    file.write_bytes(BROKEN[name](file.read_bytes()))
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (fault,) = scan_adapter(adapter)
    assert fault.startswith(f"{WEIGHTS}: is not a complete safetensors file: ")
    assert time.monotonic() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


def test_a_huge_file_is_refused_by_its_header_and_never_read(adapter):
    with (adapter / WEIGHTS).open("r+b") as file:
        file.truncate(2**40)  # sparse
    started = time.monotonic()
    (fault,) = scan_adapter(adapter)
    assert "is not a complete safetensors file" in fault
    assert time.monotonic() - started < 2
    with (adapter / WEIGHTS).open("r+b") as file:
        file.write(struct.pack("<Q", 2**39))  # a header that would fit into the file
    assert "its header would have 549,755,813,888 bytes" in scan_adapter(adapter)[0]
    (adapter / CONFIG).write_bytes(b"")
    with (adapter / CONFIG).open("r+b") as file:
        file.truncate(2**40)
    assert "more than 33,554,432" in scan_adapter(adapter)[0]


def test_faults_are_counted_beyond_the_first_twelve(tmp_path):
    weights = {f"x{number}": np.ones(1, np.float32) for number in range(500)}
    faults = scan_adapter(write(tmp_path / "adapter", weights=weights))
    assert len(faults) == 13 and faults[-1] == "and 489 faults more"


# --- all weights --------------------------------------------------------------------------------------------


@pytest.fixture
def whole(tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in names:
        save_file({name[:11]: np.ones((2, 2), np.float32)}, folder / name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {name[:11]: name for name in names}}))
    (folder / "config.json").write_text("{}")
    return folder


def test_weights_in_several_files_are_sound(whole):
    assert scan_weights(whole) == weight_faults(whole) == []


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a/../../b.safetensors", "pytorch_model.bin", "", None, 7, ["x"]]
)
def test_an_index_names_nothing_but_files_beside_it(whole, name):
    save_file({"a": np.ones(1, np.float32)}, whole.parent / "outside.safetensors")
    index = json.loads((whole / INDEX).read_text())
    index["weight_map"]["model-00001"] = name
    (whole / INDEX).write_text(json.dumps(index))
    (fault,) = scan_weights(whole)
    assert fault.startswith(f"{INDEX}: names ") and fault.endswith("which is no file of its folder")


@pytest.mark.parametrize("index", [None, [], {}, {"weight_map": []}, {"weight_map": {}}, "x"])
def test_an_index_without_files_is_refused(index):
    assert list(index_faults(index, ["a.safetensors"])) == ["names no files: it has no weight_map"]


def test_an_adapter_beside_all_weights_is_refused(whole):
    """transformers would load the base that it names, whatever it is."""
    (whole / CONFIG).write_text(json.dumps(LORA | {"base_model_name_or_path": "somebody/else"}))
    assert scan_weights(whole) == [f"{CONFIG!r} does not belong there: only JSON and safetensors are read"]


# --- fuzz ---------------------------------------------------------------------------------------------------


def test_whatever_an_index_says_it_is_refused_or_names_only_files_that_are_there():
    draw = random.Random(SEED)
    files = ["a.safetensors", "b.safetensors"]
    index = {"metadata": {"total_size": 8}, "weight_map": {"x": files[0], "y": files[1]}}
    passed = 0
    for case in range(CASES):
        changed_index = mutate_json(index, draw)
        faults = list(index_faults(changed_index, files))
        if not faults:
            passed += 1
            assert set(changed_index["weight_map"].values()) <= set(files), case
    assert 0 < passed < CASES


def mutate_header(raw: bytes, draw: random.Random) -> bytes:
    header, body = unpack(raw)
    return pack(mutate_json(header, draw), body)


def mutate(folder: Path, draw: random.Random) -> None:
    weights, config = folder / WEIGHTS, folder / CONFIG
    kind = draw.randrange(5)
    if kind == 0:
        weights.write_bytes(mutate_bytes(weights.read_bytes(), draw))
    elif kind == 1:
        weights.write_bytes(mutate_header(weights.read_bytes(), draw))
    elif kind == 2:
        config.write_bytes(mutate_bytes(config.read_bytes(), draw))
    elif kind == 3:
        config.write_text(json.dumps(mutate_json(json.loads(config.read_bytes()), draw)))
    else:
        name = draw.choice([WEIGHTS, CONFIG, "adapter_model.bin", "x/../y", "model.py"]).replace("/", "_")
        (folder / draw.choice([WEIGHTS, CONFIG])).replace(folder / name)


@pytest.mark.timeout(280 + CASES)
def test_whatever_is_in_the_files_the_scan_answers_and_what_it_lets_through_has_the_adapters_form(tmp_path):
    draw = random.Random(SEED)
    sound = write(tmp_path / "sound")
    shapes = {name: tensor.shape for name, tensor in load_file(sound / WEIGHTS).items()}
    passed = 0
    for case in range(CASES):
        folder = tmp_path / "case"
        shutil.copytree(sound, folder)
        mutate(folder, draw)
        started = time.monotonic()
        faults = scan_adapter(folder, LAYERS)
        assert time.monotonic() - started < 5, case
        assert all(isinstance(fault, str) and fault.isprintable() for fault in faults), case
        if not faults:
            passed += 1
            loaded = load_file(folder / WEIGHTS)
            assert {name: tensor.shape for name, tensor in loaded.items()} == shapes, case
            assert all(np.isfinite(tensor).all() for tensor in loaded.values()), case
            config = json.loads((folder / CONFIG).read_bytes())
            assert config["r"] == RANK and not any(config.get(name) for name in OFF if name != "revision"), case
        shutil.rmtree(folder)
    assert 0 < passed < CASES / 2
