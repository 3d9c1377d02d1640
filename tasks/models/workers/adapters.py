"""Adapters and weights on the disk: looked at before a worker loads them, and written as the same bytes each time."""

from pathlib import Path
from typing import Any

from data_contracts.errors import Problem, StoreError
from tasks.models.core.adapter_files import scan_adapter, scan_weights
from tasks.models.core.adapter_scan import Layers


def checked_adapter(folder: str | Path, base: Any) -> str:
    """The folder of an adapter that fits this base. Raises StoreError with everything that is wrong with it."""
    return _checked(folder, scan_adapter(Path(folder), layers_of(base)))


def checked_weights(folder: str | Path) -> str:
    """The folder of a model with all its weights. Raises StoreError."""
    return _checked(folder, scan_weights(Path(folder)))


def _checked(folder: str | Path, faults: list[str]) -> str:
    if faults:
        act = "restore it from a backup, or train it again with --force"
        raise StoreError(*(Problem(fault, str(folder), "an adapter as training saves it", act) for fault in faults))
    return str(folder)


def save_adapter(model: Any, folder: Path, weights: dict[str, Any] | None = None) -> None:
    """safetensors and configuration. weights: of the model, if they were put together from several processes."""
    sort_names(model.peft_config["default"])
    model.save_pretrained(str(folder), state_dict=weights)


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
