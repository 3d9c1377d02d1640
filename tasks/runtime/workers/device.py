"""Which device, number format and thread count a worker uses, each with its reason.

By hand: `python -m tasks.runtime.workers.device` prints them as JSON.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch

# CPU flags that mean bf16 arithmetic in hardware; without them a bf16 matmul is 6-9 times slower than fp32.
_BF16_CPU_FLAGS = frozenset({"amx_bf16", "avx512_bf16"})
_BF16_CUDA_CAPABILITY = (8, 0)
_BUSY_PERCENT = 50.0


@dataclass(frozen=True)
class Device:
    device: str
    precision: str
    precision_reason: str
    threads: int
    threads_reason: str
    device_reason: str = ""

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def choose_device(precision: str = "auto", threads: int | None = None, why: str | None = None) -> Device:
    """The first CUDA device if there is one, else the CPU; sets torch's threads. why: the reason of `threads`."""
    device, device_reason = _device()
    chosen, reason = _precision(device) if precision == "auto" else (precision, "set by model.precision")
    count, count_reason = (
        _threads() if threads is None else (threads, why or "set by train.threads, or the same as the first arm's")
    )
    torch.set_num_threads(count)
    return Device(device, chosen, reason, count, count_reason, device_reason)


def _device() -> tuple[str, str]:
    if torch.cuda.is_available():
        return "cuda", f"the first of {torch.cuda.device_count()} that torch finds: {torch.cuda.get_device_name()}"
    return "cpu", "torch finds no CUDA device" if torch.version.cuda else "torch is built without CUDA"


def _precision(device: str) -> tuple[str, str]:
    if device == "cuda":
        capability = torch.cuda.get_device_capability()
        name = f"{torch.cuda.get_device_name()} (CUDA capability {capability[0]}.{capability[1]})"
        if capability >= _BF16_CUDA_CAPABILITY:
            return "bf16", f"{name} has bf16 in hardware"
        return "fp32", f"{name} has no bf16 in hardware, which starts at 8.0"
    found = _cpu_flags() & _BF16_CPU_FLAGS
    if found:
        return "bf16", f"the CPU has {', '.join(sorted(found))}"
    return "fp32", "no CUDA device, and the CPU has neither amx_bf16 nor avx512_bf16"


def _cpu_flags() -> set[str]:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return set()
    lines = (line for line in cpuinfo.read_text().splitlines() if line.startswith(("flags", "Features")))
    return set(next(lines, "").partition(":")[2].split())


def _threads() -> tuple[int, str]:
    if "OMP_NUM_THREADS" in os.environ:
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        reason = f"OMP_NUM_THREADS, or the share of each of {ranks} workers" if ranks > 1 else "set by OMP_NUM_THREADS"
        return int(os.environ["OMP_NUM_THREADS"]), reason
    return free_threads()


def free_threads() -> tuple[int, str]:
    """The cores that no other process is using: a second thread on a busy core makes a step 4-20 times slower."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    percent = psutil.cpu_percent(interval=0.5, percpu=True)
    busy = sum(percent[core] > _BUSY_PERCENT for core in cores if core < len(percent))
    free = max(1, len(cores) - busy)
    return free, f"{free} of {len(cores)} cores are free"


def arithmetic(tensor: torch.Tensor) -> torch.dtype:
    """What a product of it is computed in. Autocast reaches no autograd node of our own, so that has to ask."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def peak_bytes(device: Device) -> int:
    """Highest device memory on CUDA, the process's resident memory on a CPU."""
    return torch.cuda.max_memory_allocated() if device.device == "cuda" else peak_rss_bytes()


def bytes_now(device: Device) -> int:
    """What `peak_bytes` is the peak of, at this moment."""
    return torch.cuda.memory_allocated() if device.device == "cuda" else int(psutil.Process().memory_info().rss)


def peak_rss_bytes() -> int:
    """Highest resident memory of this process since its start, or since `reset_peak_rss`."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_rss() -> int:
    """The peak so far; it starts again (Linux: man 5 proc, clear_refs; elsewhere it stays the process's peak)."""
    peak = peak_rss_bytes()
    clear_refs = Path("/proc/self/clear_refs")
    if clear_refs.exists():
        clear_refs.write_text("5")
    return peak


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(choose_device()) | {"gpus": torch.cuda.device_count()}) + "\n")
