"""A model whose weights are divided among the ranks, layer by layer (FSDP2, torch's fully_shard), and joined to be
saved.

4-bit weights are divided like others because they are kept in tensors of the arithmetic's number format
(bnb_4bit_quant_storage), which FSDP can divide; their constants stay whole on every rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from data_contracts.errors import ConfigError, Problem
from tasks.models.core.adapter_files import WEIGHTS
from tasks.models.workers.scoring import scored_losses
from tasks.runtime.workers.ranks import ranks


def shard(model: Any, device: str) -> None:
    """Leave each rank with its part of every weight, on `device`; a layer is whole only while it is computed.

    Then `model(batch=...)` gives the scored losses. It must be called by all ranks alike.
    """
    for parameter in model.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            state.to(device)
    mesh = init_device_mesh(device, (ranks(),))
    for module in [*decoder_layers(model), model]:
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.0)  # losses are divided by the tokens of all ranks already
        module.set_force_sum_reduction_for_comms(enable=True)  # gloo has no other
    whole = model.forward

    def forward(batch: Any = None, **inputs: Any) -> Any:
        return whole(**inputs) if batch is None else scored_losses(model, batch)

    model.forward = forward


def decoder_layers(model: Any) -> list[torch.nn.Module]:
    """The layers that are divided one by one: those that transformers says must not be split. Raises ConfigError."""
    base: PreTrainedModel = model.get_base_model()
    names = set(base._no_split_modules or ())
    found = [module for module in base.modules() if type(module).__name__ in names]
    if not found:
        what = "this architecture does not say what its layers are"
        raise ConfigError(Problem(what, type(base).__name__, act="set train.sharding to none"))
    return found


def is_sharded(model: Any) -> bool:
    return isinstance(model, FSDPModule)


def whole_weights(model: Any) -> dict[str, torch.Tensor]:
    """What is trained, put together. All ranks must call it."""
    return {name: _whole(weight.detach()) for name, weight in model.named_parameters() if weight.requires_grad}


def load_weights(model: Any, adapter_folder: Path) -> None:
    """Give each rank its part of a saved adapter."""
    saved = load_file(adapter_folder / WEIGHTS)
    for name, weight in get_peft_model_state_dict(model).items():
        weight.copy_(_part(saved[name], weight))


@contextmanager
def whole_states(optimizer: Any) -> Iterator[None]:
    """The optimiser's states put together inside the block, so that they can be saved. All ranks must call it."""
    parts = {weight: dict(state) for weight, state in optimizer.state.items()}
    for state in optimizer.state.values():
        state.update({name: _whole(value) for name, value in state.items()})
    try:
        yield
    finally:
        for weight, state in parts.items():
            optimizer.state[weight].update(state)


def divide_states(optimizer: Any) -> None:
    """The other way: after whole states were loaded, keep this rank's part."""
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                state[name] = _part(value, weight)


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _part(value: torch.Tensor, like: Any) -> torch.Tensor:
    """This rank's part, cut out of what it has whole: nothing is sent."""
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
