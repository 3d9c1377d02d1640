"""Load a base model in one of its two forms: as stored, or quantised to NF4 with double quantisation."""

import gc
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from tasks.workers.device import Device
from tasks.workers.tree_attention import NAME


def load_base(folder: Path, method: str, device: Device) -> PreTrainedModel:
    """`lora` gives the full-precision base, `qlora` NF4 (arXiv 2305.14314: blocks of 64, constants quantised again).

    Safetensors only; no code from the base is run.
    """
    options: dict[str, Any] = {"dtype": device.dtype, "attn_implementation": NAME, "device_map": {"": device.device}}
    if method == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=device.dtype,
        )
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, use_safetensors=True, trust_remote_code=False, **options
    )
    if method == "qlora":
        _leave_the_file(model)
        _keep_the_weights(model)
    model.config.use_cache = False
    model.requires_grad_(False)
    model.eval()
    return model


def _leave_the_file(model: torch.nn.Module) -> None:
    """Copy what was not quantised, so that the memory-mapped full-precision file is let go.

    One tensor left in the mapping keeps all of the file's pages, that quantisation has read, in resident memory.
    """
    for parameter in model.parameters():
        if not hasattr(parameter, "quant_state"):
            parameter.data = parameter.data.clone()
    gc.collect()


def _keep_the_weights(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking weights for its bf16 kernel, which it does on CPUs with AVX512_BF16.

    The first forward without gradients would change them in place: fp32 arithmetic would become bf16, and training
    after it would have no gradient.
    """
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def weights_bytes(model: torch.nn.Module) -> int:
    """Bytes of the base's weights as stored, with quantisation constants; adapters are not counted."""
    seen: dict[int, int] = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            continue
        seen[parameter.data_ptr()] = parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        for tensor in _constants(state):
            seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def _constants(state: Any) -> list[torch.Tensor]:
    if state is None:
        return []
    parts = [state.absmax, state.code]
    if state.nested:
        parts += [state.state2.absmax, state.state2.code]
    return parts
