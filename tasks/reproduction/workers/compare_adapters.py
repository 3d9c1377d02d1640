"""The distance of two adapters, or of two models: `python -m tasks.reproduction.workers.compare_adapters spec.json out/`."""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from data_contracts.jobs.reproduction import AdaptersReport, CompareAdaptersJob
from tasks.runtime.workers.harness import main


def compare_adapters(job: CompareAdaptersJob, out: Path) -> dict[str, Any]:
    """An AdaptersReport."""
    found = distance(tensors(Path(job.then)), tensors(Path(job.now)))
    return AdaptersReport(distance=found).model_dump(mode="json")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def distance(then: dict[str, torch.Tensor], now: dict[str, torch.Tensor]) -> float:
    """The largest |now - then| / |then| of a tensor; infinite if one has tensors that the other does not have."""
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
    main(compare_adapters, CompareAdaptersJob)
