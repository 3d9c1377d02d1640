"""Make a step-0 adapter in out/adapter/: `python -m tasks.models.workers.init_adapter spec.json out/`."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, set_seed

from data_contracts.errors import ConfigError, Problem
from data_contracts.jobs.models import InitAdapterJob, LoftqStart, LoraStart, StartSettings
from data_contracts.reports import Quantisation
from tasks.models.workers.loading import load_base, save_adapter
from tasks.models.workers.pissa_olora_loftq import adapted, make_up_for_quantisation
from tasks.runtime.workers.device import choose_device
from tasks.runtime.workers.harness import main

_INITS: dict[str, Any] = {"default": True, "loftq": True, "pissa": "pissa_niter_16", "olora": "olora"}
"""`init_lora_weights` of PEFT. PiSSA's randomised SVD takes seconds where the exact one takes minutes; what it leaves
out changes no result, since the very same parts are taken off the base (tasks/models/workers/pissa_olora_loftq.py)."""


def make_step0(job: InitAdapterJob, out: Path) -> dict[str, Any]:
    """By default LoRA A is drawn at random and B is zero, so the adapter changes nothing yet."""
    settings = job.settings
    base = _quantised_base(job.base, settings) if isinstance(settings, LoftqStart) else _stored_base(job.base)
    # Trainer seeds only later, after LoRA A would have been drawn.
    set_seed(settings.seed)
    try:
        model: Any = get_peft_model(base, _config(settings))
        _check_rank(model, settings)
    except ValueError as error:
        act = "train.target_modules: all-linear, or names of layers; train.rank: at most a layer's smaller side"
        raise ConfigError(Problem(str(error), "train.target_modules, train.rank", act=act)) from error
    if isinstance(settings, LoftqStart):
        make_up_for_quantisation(model, _stored_base(job.base))
    # Loaded back it must not be computed once more, from a base that it was taken off.
    model.peft_config["default"].init_lora_weights = True
    save_adapter(model, out / "adapter")
    return {"trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)}


def _stored_base(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(base), dtype="auto", use_safetensors=True, trust_remote_code=False)


def _quantised_base(base: Path, settings: LoftqStart) -> Any:
    quantisation = Quantisation(quant_type=settings.quant_type, double_quant=settings.double_quant)
    return load_base(base, "qlora", choose_device(settings.precision), quantisation)


def _config(settings: StartSettings) -> PeftConfig:
    if not isinstance(settings, LoraStart | LoftqStart):
        return PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=settings.prefix_tokens)
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights=_INITS[settings.init],
    )


def _check_rank(model: torch.nn.Module, settings: StartSettings) -> None:
    """Raise ValueError if the start is made of a layer's parts, and it has fewer than `rank` of them."""
    if not isinstance(settings, LoraStart | LoftqStart) or settings.init == "default":
        return
    smallest = min(min(layer.in_features, layer.out_features) for _, layer in adapted(model))
    if settings.rank > smallest:
        raise ValueError(f"init={settings.init} cannot make a rank of {settings.rank} from a layer of {smallest}")


if __name__ == "__main__":
    main(make_step0, InitAdapterJob)
