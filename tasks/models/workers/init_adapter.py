"""Make a step-0 adapter: `python -m tasks.models.workers.init_adapter spec.json out/`.

spec: base (folder), seed, and by kind the settings of data_contracts.train_spec.TrainSpec: `lora` rank, alpha, dropout,
target_modules, use_rslora, use_dora, init, for init=loftq quant_type, double_quant and precision too; `prefix`
prefix_tokens. Writes out/adapter/.
"""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, set_seed

from data_contracts.errors import ConfigError, Problem
from tasks.models.workers.loading import load_base, save_adapter
from tasks.models.workers.lora_init import adapted, make_up_for_quantisation
from tasks.runtime.workers.device import choose_device
from tasks.runtime.workers.harness import main

_INITS: dict[str, Any] = {"default": True, "loftq": True, "pissa": "pissa_niter_16", "olora": "olora"}
"""`init_lora_weights` of PEFT. PiSSA's randomised SVD takes seconds where the exact one takes minutes; what it leaves out
changes no result, since the very same parts are taken off the base (tasks/models/workers/lora_init.py)."""


def init_adapter(spec: dict[str, Any], out: Path) -> dict[str, Any]:
    """By default LoRA A is drawn at random and B is zero, so the adapter changes nothing yet."""
    is_loftq = spec["kind"] == "lora" and spec["init"] == "loftq"
    base = _quantised_base(spec) if is_loftq else _stored_base(spec)
    # Trainer seeds only later, after LoRA A would have been drawn.
    set_seed(spec["seed"])
    try:
        model: Any = get_peft_model(base, _prefix(spec) if spec["kind"] == "prefix" else _lora(spec))
        _check_rank(model, spec)
    except ValueError as error:
        act = "train.target_modules: all-linear, or names of layers; train.rank: at most a layer's smaller side"
        raise ConfigError(Problem(str(error), "train.target_modules, train.rank", act=act)) from error
    if is_loftq:
        make_up_for_quantisation(model, _stored_base(spec))
    # Loaded back it must not be computed once more, from a base that it was taken off.
    model.peft_config["default"].init_lora_weights = True
    save_adapter(model, out / "adapter")
    return {"trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)}


def _stored_base(spec: dict[str, Any]) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        spec["base"], dtype="auto", use_safetensors=True, trust_remote_code=False
    )


def _quantised_base(spec: dict[str, Any]) -> Any:
    return load_base(Path(spec["base"]), "qlora", choose_device(spec["precision"], None), spec)


def _lora(spec: dict[str, Any]) -> PeftConfig:
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=spec["rank"],
        lora_alpha=spec["alpha"],
        lora_dropout=spec["dropout"],
        target_modules=spec["target_modules"],
        use_rslora=spec["use_rslora"],
        use_dora=spec["use_dora"],
        init_lora_weights=_INITS[spec["init"]],
    )


def _prefix(spec: dict[str, Any]) -> PeftConfig:
    return PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=spec["prefix_tokens"])


def _check_rank(model: torch.nn.Module, spec: dict[str, Any]) -> None:
    """Raise ValueError if the start is made of a layer's parts, and it has fewer than `rank` of them."""
    if spec["kind"] == "prefix" or spec["init"] == "default":
        return
    smallest = min(min(layer.in_features, layer.out_features) for _, layer in adapted(model))
    if spec["rank"] > smallest:
        raise ValueError(f"init={spec['init']} cannot make a rank of {spec['rank']} from a layer of {smallest}")


if __name__ == "__main__":
    main(init_adapter)
