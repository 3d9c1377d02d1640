"""QLoRA's time over LoRA's by the tokens of a step: 4-bit weights are unpacked once a step, whatever its size.

Both train in turn on the same rows, each in a process of its own; the first step is left out.

    python -m benchmarks.step_size [--rows 64] [--turns 1] [--tokens 256 1024 4096] [--data FILE.json]
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.training import prepare, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--data", type=Path)
    arguments = parser.parse_args()
    arguments.method, arguments.batch_rows = "lora", 8
    print(f"{'tokens a step':>13}{'LoRA tok/s':>12}{'QLoRA tok/s':>13}{'QLoRA takes':>13}")
    with tempfile.TemporaryDirectory() as folder:
        spec = prepare(Path(folder), arguments)
        for tokens in arguments.tokens:
            pairs = [pair(Path(folder), spec | {"batch_tokens_a_step": tokens}) for _ in range(arguments.turns)]
            lora, qlora = (statistics.median(speeds) for speeds in zip(*pairs, strict=True))
            ratio = statistics.median(fast / slow for fast, slow in pairs)
            print(f"{tokens:>13,}{lora:>12.1f}{qlora:>13.1f}{ratio - 1:>+13.1%}", flush=True)


def pair(folder: Path, spec: dict[str, object]) -> tuple[float, float]:
    lora, qlora = (
        run("tunegate", sys.executable, folder, spec | {"method": name})["tokens_per_s"] for name in ("lora", "qlora")
    )
    return lora, qlora


if __name__ == "__main__":
    main()
