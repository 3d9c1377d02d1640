"""LoRA from other starts than zero, on a base that stays as it is: all arms and the registry share it.

PiSSA and OLoRA begin with parts of the base's own weights W, A0 and B0, and train on what is left: (W - s B0 A0) + s B
A. PEFT changes W for that, and quantises the rest anew. Here W stays, full or in 4 bits, and s B0 A0 x is taken off
each layer's output, which is the same function; what is saved is a plain LoRA of twice the rank, [A, A0] and [B, -B0].
Shapes: I in, O out, R rank; s = alpha / rank, or alpha / sqrt(rank).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear

from tasks.models.core.adapter_files import WEIGHTS
from tasks.models.workers.loading import dequantised, sort_names

TAKEN_OFF = ("pissa", "olora")
"""Starts that are parts of the base's weights."""


def adapted(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers with an adapter, by their names in the base."""
    layers = model.named_modules()
    return ((path.removeprefix("base_model.model."), layer) for path, layer in layers if isinstance(layer, LoraLayer))


def take_off_start(model: torch.nn.Module, name: str = "default") -> None:
    """Let each adapted layer begin at the base's own output, whatever its A and B start from.

    The start is kept in buffers of the layer that are not saved.
    """
    for _, layer in adapted(model):
        base = layer.get_base_layer()
        base.register_buffer("start_A", layer.lora_A[name].weight.detach().clone(), persistent=False)
        base.register_buffer("start_B", layer.lora_B[name].weight.detach().clone(), persistent=False)
        base.start_scale = layer.scaling[name]
        base.register_forward_hook(_less_start)


def _less_start(base: Any, inputs: tuple[torch.Tensor, ...], output: Any) -> Any:
    (x,) = inputs
    low = linear(x, base.start_A.to(x.dtype))
    return output - base.start_scale * linear(low, base.start_B.to(x.dtype))


def make_up_for_quantisation(model: torch.nn.Module, stored: torch.nn.Module, name: str = "default") -> None:
    """LoftQ's start (arXiv 2310.08659, one step): s B A is the best rank R part of what each layer lost in 4 bits.

    With one step the quantised weights are those of the plain base, so it stays. PEFT's own function runs on CUDA only,
    and forgets the scale s. stored: the base in full precision.
    """
    for path, layer in adapted(model):
        whole: Any = stored.get_submodule(path).weight
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        lost_OI = whole.detach().float().to(down.device) - dequantised(layer.get_base_layer().weight).float()
        left_OK, values_K, right_KI = torch.linalg.svd(lost_OI / layer.scaling[name], full_matrices=False)
        root_R = values_K[: len(down)].sqrt()
        down.data.copy_(root_R[:, None] * right_KI[: len(down)])
        up.data.copy_(left_OK[:, : len(down)] * root_R)


def as_plain_lora(adapter_folder: Path, step0: Path) -> None:
    """Make a saved adapter that was trained with `take_off_start` one that fits the base as it is, in place."""
    trained, start = load_file(adapter_folder / WEIGHTS), load_file(step0 / WEIGHTS)
    signs = {"lora_A": (0, 1), "lora_B": (1, -1)}  # the dimension of the rank, and the start's sign
    joined = {}
    for key, weight in trained.items():
        dim, sign = signs["lora_A" if ".lora_A." in key else "lora_B"]
        joined[key] = torch.cat([weight, sign * start[key]], dim=dim).contiguous()
    save_file(joined, adapter_folder / WEIGHTS, metadata={"format": "pt"})
    config: Any = PeftConfig.from_pretrained(str(adapter_folder))
    if config.use_rslora:  # its scale would be another at twice the rank
        config.use_rslora, scale = False, config.lora_alpha / config.r**0.5
    else:
        scale = config.lora_alpha / config.r
    config.r *= 2
    config.lora_alpha = scale * config.r
    sort_names(config)
    config.save_pretrained(str(adapter_folder))
