"""The processes that train one arm together: which of them this is, and what all of them must agree on.

Started alone, a worker is rank 0 of 1 and nothing here communicates. Otherwise torchrun or Ray Train set RANK and
WORLD_SIZE (https://docs.pytorch.org/docs/stable/elastic/run.html), and ranks meet by a file: nothing but the loopback
interface is listened on.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

MEETING = "TUNEGATE_MEETING"
"""Environment variable that names the file by which the ranks of one machine find each other."""
_PATIENCE = timedelta(minutes=30)  # of a rank that waits for another: validation and checkpoints included


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined() -> Iterator[None]:
    """Join the process group of all ranks, and leave it at the end, unless Ray Train has done so."""
    if ranks() == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    file = f"file://{os.environ[MEETING]}"
    dist.init_process_group(backend, init_method=file, rank=rank(), world_size=ranks(), timeout=_PATIENCE)
    yield
    dist.destroy_process_group()


def loopback() -> str:
    """The name of this machine's loopback interface."""
    found = psutil.net_if_addrs().items()
    return next(name for name, addresses in found if any(each.address == "127.0.0.1" for each in addresses))


def wait() -> None:
    """Continue once all ranks are here."""
    if ranks() > 1:
        dist.barrier()


def total(values: Iterable[float]) -> list[float]:
    """Sums over all ranks, in double precision."""
    return _reduced(values, dist.ReduceOp.SUM)


def largest(values: Iterable[float]) -> list[float]:
    return _reduced(values, dist.ReduceOp.MAX)


def from_first(value: int) -> int:
    """The number that rank 0 has."""
    return int(total([value if rank() == 0 else 0])[0])


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Give every rank the sum of all ranks' gradients, in one message; a rank without a gradient adds nothing."""
    parameters = list(parameters)
    if ranks() == 1:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    dist.all_reduce(flat)
    parts = flat.split([grad.numel() for grad in grads])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)


def _reduced(values: Iterable[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
    found = torch.tensor([float(value) for value in values], dtype=torch.float64)
    if ranks() > 1:
        dist.all_reduce(found, operation)
    return [float(value) for value in found]
