"""What a worker loads beside the base is looked at first: adapters against the base's own layers, weights by themselves."""

from pathlib import Path
from typing import Any

from data_contracts.errors import Problem, StoreError
from tasks.core.adapter_files import scan_adapter, scan_weights
from tasks.core.adapter_scan import Layers


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


def layers_of(base: Any) -> Layers:
    """Inputs and outputs of every layer that may get an adapter, quantised or not."""
    found: dict[str, tuple[int, int]] = {}
    for name, module in base.named_modules():
        for inputs, outputs in (("in_features", "out_features"), ("num_embeddings", "embedding_dim"), ("nx", "nf")):
            if hasattr(module, inputs):
                found[name] = (int(getattr(module, inputs)), int(getattr(module, outputs)))
    return found
