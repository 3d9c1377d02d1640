"""Architectures read off models, and which cards a plan fits.

Run: pytest tests/training/test_cards.py
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

import data_contracts
from data_contracts.errors import ConfigError
from tasks.training.core.architecture import Architecture, decoder
from tasks.training.core.fitting import USABLE, card, changes, needed, usable_bytes
from tasks.training.core.memory_settings import Settings, Stack
from tasks.training.workers.describe_base import architecture_of

SHAPES = json.loads((Path(data_contracts.__file__).parent / "architectures.json").read_text())


# --- architectures ------------------------------------------------------------------------------------------


def config_of(name: str, shape: dict):
    kinds = {"qwen2.5": Qwen2Config, "qwen3": Qwen3Config, "gemma": GemmaConfig, "mistral": MistralConfig}
    kind = next((kinds[start] for start in kinds if name.startswith(start)), LlamaConfig)
    extra = {"head_dim": shape["head_dim"]} if "head_dim" in shape else {}
    return kind(
        hidden_size=shape["hidden"], intermediate_size=shape["inner"], num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"], num_key_value_heads=shape.get("kv_heads", shape["heads"]),
        vocab_size=shape["vocab"], tie_word_embeddings=shape.get("tied", False), **extra,
    )  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_that_comes_with_the_package_is_the_models_own(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(name, SHAPES[name]))
    arch = architecture_of(model)
    assert arch == decoder(SHAPES[name]) == Architecture.from_report(json.loads(json.dumps(dataclasses.asdict(arch))))
    assert arch.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("kind", [PhiConfig, Phi3Config])
def test_other_forms_of_a_block_are_read_too(kind):
    config = kind(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=100,
        pad_token_id=0,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    arch = architecture_of(model)
    assert arch.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (arch.fused_qkv, arch.gated) == ((True, True) if kind is Phi3Config else (False, False))


def test_a_base_without_formulas_is_refused():
    config = Qwen2MoeConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, vocab_size=100
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match="the planner counts"):
        architecture_of(model)


# --- cards --------------------------------------------------------------------------------------------------


def test_7b_lora_needs_about_16_gb_not_24():
    arch = decoder(SHAPES["llama-2-7b"])
    asked = Settings("lora", 1024, checkpointing=True)
    assert 13.5 < needed(arch, asked) / 2**30 < 16
    assert card(arch, asked, 16).fits
    assert not card(arch, dataclasses.replace(asked, checkpointing=False, length=3072), 24).fits


def test_70b_qlora_fits_48_gb_only_under_stated_settings():
    arch = decoder(SHAPES["llama-2-70b"])
    plain = card(arch, Settings("qlora", 512), 48)
    assert plain.changes == ("train.activation_checkpointing=true",)
    assert not card(arch, Settings("qlora", 512, checkpointing=True, stack=Stack(kbit_upcast=True), rank=64), 48).fits
    assert card(arch, Settings("lora", 512), 48).changes is not None
    assert card(arch, Settings("lora", 512), 24).changes is None


def test_the_largest_step_fits_and_one_more_row_or_token_does_not():
    arch = decoder(SHAPES["llama-3-8b"])
    asked = Settings("qlora", 1024, checkpointing=True)
    found = card(arch, asked, 24)
    room = usable_bytes(24)
    assert room == int(24 * USABLE * 2**30)
    for key, most in (("batch", found.most_rows), ("length", found.longest_row)):
        assert most > 1
        assert needed(arch, dataclasses.replace(asked, **{key: most})) <= room
        assert needed(arch, dataclasses.replace(asked, **{key: most + 1})) > room


def test_changes_add_up_and_each_one_saves():
    arch = decoder(SHAPES["llama-2-7b"])
    asked = Settings("lora", 2048, batch=4)
    found = changes(arch, asked)
    assert len(found) > 4
    assert all(change.saves > 0 for change in found)
    assert needed(arch, asked) - sum(change.saves for change in found) == found[-1].total
