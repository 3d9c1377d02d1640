"""Load a base model in one of its forms: as stored, in fp32 to train all of it, or quantised to 4 bits."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from safetensors import safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
)

from data_contracts.errors import Problem, StoreError
from data_contracts.reports import Quantisation
from tasks.models.core.adapter_files import scan_adapter, scan_weights
from tasks.models.core.adapter_scan import Layers
from tasks.models.workers.tree_attention import ATTENTION
from tasks.runtime.workers.device import Device

QLORA = Quantisation(quant_type="nf4", double_quant=True)
"""As in arXiv 2305.14314: normal floats in blocks of 64, constants quantised again."""


def load_base(
    folder: Path, method: str, device: Device, quantisation: Quantisation = QLORA, *, trains_all: bool = False,
    storage: torch.dtype = torch.uint8,
) -> PreTrainedModel:  # fmt: skip
    """`qlora` gives the base in 4 bits, quantised as asked; all else as stored, frozen.

    trains_all: every weight may be trained, in fp32 whatever the arithmetic: at 1e-5 of a weight a step is lost in
    bf16's 8 bits. storage: the number format of the tensors that hold 4-bit weights. Safetensors only; no code from the
    base is run.
    """
    dtype = torch.float32 if trains_all else device.dtype
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": ATTENTION, "device_map": {"": device.device}}
    is_quantised = method == "qlora"
    model = _quantised(folder, device, options, quantisation, storage) if is_quantised else _stored(folder, options)
    model.config.use_cache = False
    model.requires_grad_(trains_all)
    model.eval()
    return model


def _stored(folder: Path, options: dict[str, Any]) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, use_safetensors=True, trust_remote_code=False, **options
    )
    return model


def _quantised(
    folder: Path, device: Device, options: dict[str, Any], quantisation: Quantisation, storage: torch.dtype
) -> PreTrainedModel:
    """4 bits, one tensor after the other: read through its own mapping of the file, which is closed at once.

    transformers maps the whole file until the end, and every page that quantisation has read stays in memory.
    """
    bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantisation.quant_type,
        bnb_4bit_use_double_quant=quantisation.double_quant,
        bnb_4bit_compute_dtype=device.dtype,
        bnb_4bit_quant_storage=storage,
    )
    tensors = {name: _Tensor(file, name) for file in sorted(folder.glob("*.safetensors")) for name in _names(file)}
    if not tensors:
        return _stored(folder, options | {"quantization_config": bits})  # says what is missing
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model: PreTrainedModel = kind.from_pretrained(
        None, config=config, state_dict=tensors, quantization_config=bits, **options
    )
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    keep_the_weights(model)
    return model


@dataclass(frozen=True)
class _Tensor:
    """A tensor in a file, read when transformers asks for it, as it asks safetensors' own slices."""

    file: Path
    name: str

    def __getitem__(self, _: Any) -> torch.Tensor:
        with safe_open(self.file, framework="pt") as stored:
            tensor: torch.Tensor = stored.get_tensor(self.name).clone()
        return tensor


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as stored:
        return list(stored.keys())


def keep_the_weights(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking weights for its bf16 kernel, which it does on CPUs with AVX512_BF16.

    The first forward without gradients would change them in place: fp32 arithmetic would become bf16, and training
    after it would have no gradient.
    """
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors; shared ones count once."""
    return sum({each.data_ptr(): each.numel() * each.element_size() for each in tensors}.values())


def weights_bytes(model: torch.nn.Module) -> int:
    """Bytes of the base's weights as stored, with quantisation constants; adapters are not counted."""
    stored = [parameter for name, parameter in model.named_parameters() if not _is_adapters(name)]
    constants = (tensor for weight in stored for tensor in _constants(getattr(weight, "quant_state", None)))
    return tensor_bytes([*stored, *constants])


def adapters_bytes(model: torch.nn.Module) -> int:
    """Bytes of LoRA's layers or a prefix, with the start that some are measured from (pissa_olora_loftq.py)."""
    own = [parameter for name, parameter in model.named_parameters() if _is_adapters(name)]
    return tensor_bytes([*own, *(start for name, start in model.named_buffers() if ".start_" in name)])


def _is_adapters(name: str) -> bool:
    return "lora_" in name or "prompt_encoder" in name


def dequantised(weight: Any, state: Any = None) -> torch.Tensor:
    """A layer's weight [O, I] as numbers, if it is quantised; else as it is. state: its constants, if it comes
    without."""
    state = state or getattr(weight, "quant_state", None)
    numbers: torch.Tensor = weight.data if state is None else dequantize_4bit(weight.data, state)
    return numbers


def _constants(state: Any) -> list[torch.Tensor]:
    if state is None:
        return []
    parts = [state.absmax, state.code]
    if state.nested:
        parts += [state.state2.absmax, state.state2.code]
    return parts


def scanned_adapter(adapter_folder: str | Path, base: Any) -> str:
    """The folder of an adapter that fits this base. Raises StoreError with everything that is wrong with it."""
    return _without_faults(adapter_folder, scan_adapter(Path(adapter_folder), layers_of(base)))


def scanned_weights(folder: str | Path) -> str:
    """The folder of a model with all its weights. Raises StoreError."""
    return _without_faults(folder, scan_weights(Path(folder)))


def _without_faults(folder: str | Path, faults: list[str]) -> str:
    if faults:
        act = "restore it from a backup, or train it again with --force"
        raise StoreError(*(Problem(fault, str(folder), "an adapter as training saves it", act) for fault in faults))
    return str(folder)


def save_adapter(model: Any, adapter_folder: Path, weights: dict[str, Any] | None = None) -> None:
    """safetensors and configuration. weights: of the model, if they were put together from several processes."""
    sort_names(model.peft_config["default"])
    model.save_pretrained(str(adapter_folder), state_dict=weights)


def sort_names(config: Any) -> None:
    """PEFT keeps a LoRA's layers in a set, which each process would write in an order of its own."""
    if isinstance(names := getattr(config, "target_modules", None), set):
        config.target_modules = sorted(names)


def layers_of(base: Any) -> Layers:
    """Inputs and outputs of every layer that may get an adapter, quantised or not."""
    found: dict[str, tuple[int, int]] = {}
    for name, module in base.named_modules():
        for inputs, outputs in (("in_features", "out_features"), ("num_embeddings", "embedding_dim"), ("nx", "nf")):
            if hasattr(module, inputs):
                found[name] = (int(getattr(module, inputs)), int(getattr(module, outputs)))
    return found
