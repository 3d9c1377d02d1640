"""The forms in which a model is scored: the base in full precision or in 4 bits, an adapter on it or merged into it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig

from data_contracts.jobs.evaluation import AdaptedModel
from data_contracts.reports import Quantisation
from data_contracts.train_spec import LORA_ARMS
from tasks.models.workers.loading import load_base, scanned_adapter, scanned_weights
from tasks.runtime.workers.device import Device


@dataclass(frozen=True, order=True)
class ModelForm:
    """What is loaded for some targets; no two adapters are merged into the same weights.

    merged: folder of the adapter; own: folder of tuned weights; quant_type: empty in full precision.
    """

    merged: str = ""
    own: str = ""
    quant_type: str = ""
    double_quant: bool = False


def form_of(target: AdaptedModel) -> ModelForm:
    if target.adapter_folder and target.method == "full":
        return ModelForm(own=target.adapter_folder)
    if target.adapter_folder and target.merged:
        return ModelForm(merged=target.adapter_folder)
    quantised = target.quantisation
    return ModelForm(quant_type=quantised.quant_type, double_quant=quantised.double_quant) if quantised else ModelForm()


def loading_note(form: ModelForm, device: Device) -> str:
    what = "tuned weights" if form.own else "the base with an adapter merged into it" if form.merged else "the base"
    return f"loading {what} ({form.quant_type.upper() or device.precision})"


def load_form(form: ModelForm, base: Path, device: Device) -> Any:
    if form.merged:
        return rounded(merge(load_base(base, "lora", _as_stored(base, device)), form.merged), device)
    folder = Path(scanned_weights(form.own)) if form.own else base
    if not form.quant_type:
        return load_base(folder, "lora", device)
    return load_base(folder, "qlora", device, Quantisation(quant_type=form.quant_type, double_quant=form.double_quant))


def attach_adapter(model: Any, target: AdaptedModel) -> Any:
    """The model with the target's adapter on it; itself where that is part of its weights, or there is none."""
    if not target.adapter_folder or target.method == "full" or target.merged:
        return model
    return PeftModel.from_pretrained(model, scanned_adapter(target.adapter_folder, model)).eval()


def detach_adapter(tuned: Any, target: AdaptedModel) -> None:
    """Leave the base as it was before `attach_adapter`."""
    if isinstance(tuned, PeftModel) and target.method in LORA_ARMS:
        tuned.unload()  # a prefix is no part of the model


def merge(model: Any, adapter_folder: str, watch: Callable[[torch.Tensor, torch.Tensor], None] | None = None) -> Any:
    """The model with a LoRA adapter added to its weights: summed in fp32, layer by layer, kept as they are stored.

    watch: gets each layer's weights in fp32, before and after.
    """
    tuned = PeftModel.from_pretrained(model, scanned_adapter(adapter_folder, model)).eval()
    for layer in tuned.modules():
        if isinstance(layer, LoraLayer):
            weight: Any = layer.get_base_layer().weight
            stored = weight.dtype
            weight.data = weight.data.float()
            before = weight.data.clone() if watch else None
            layer.merge()
            if watch and before is not None:
                watch(before, weight.data)
            weight.data = weight.data.to(stored)
    return tuned.unload()


def rounded(model: Any, device: Device) -> Any:
    """Every weight rounded to bf16, as a merged model is saved, and computed with as the device does."""
    for weight in model.parameters():
        weight.data = weight.data.to(torch.bfloat16).to(device.dtype)
    return model


def _as_stored(base: Path, device: Device) -> Device:
    """Weights are rounded once, after the adapter is added: a base that is kept in 32 bits is loaded so."""
    stored = AutoConfig.from_pretrained(base, trust_remote_code=False).dtype
    return replace(device, precision="bf16" if stored == torch.bfloat16 else "fp32")
