"""How far two adapters, or two models, lie apart: `python -m tasks.reproduction.workers.compare_adapters spec.json out/`.

spec: then, now (folders of safetensors). report: distance, the largest |now - then| / |then| of a tensor; infinite if one has
tensors that the other has not.
"""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tasks.runtime.workers.harness import main


def compare(spec: dict[str, Any], out: Path) -> dict[str, Any]:
    return {"distance": distance(tensors(Path(spec["then"])), tensors(Path(spec["now"])))}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def distance(then: dict[str, torch.Tensor], now: dict[str, torch.Tensor]) -> float:
    shapes = [{name: tensor.shape for name, tensor in found.items()} for found in (then, now)]
    if shapes[0] != shapes[1] or not then:
        return math.inf
    return max(relative(tensor.double(), now[name].double()) for name, tensor in then.items())


def relative(then: torch.Tensor, now: torch.Tensor) -> float:
    """Of a tensor that was zero: zero if it is so now, else infinite. Not a number is infinitely far."""
    away, size = float((now - then).norm()), float(then.norm())
    if away == 0.0:
        return 0.0
    return away / size if size and math.isfinite(away) else math.inf


if __name__ == "__main__":
    main(compare)
