"""The memory planner against published peaks, next to LLaMA-Factory's table and `accelerate estimate-memory`.

Every row of published_peaks.json names its source and settings; `known` rows were seen while the formulas were written,
`held out` ones only afterwards, `outside` ones hold a base in a format the planner does not know (not counted).

    python benchmarks/planner.py            # a markdown table and the medians
"""

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.commands.estimate import estimate_training_usage

import data_contracts
from tasks.training.core.architecture import Architecture, decoder
from tasks.training.core.memory import MemoryParts, predict
from tasks.training.core.memory_settings import Settings, Stack

FILE = Path(__file__).parent / "published_peaks.json"
SHAPES = Path(data_contracts.__file__).parent / "architectures.json"
UNITS = {"GB": 10**9, "GiB": 2**30}
SETTINGS = ("rank", "targets", "dropout", "double_quant", "optimiser", "checkpointing", "accumulation")
# README of LLaMA-Factory, "Hardware requirement": GB for 7B, 14B, 30B, 70B; other sizes by its last column, x billion.
LLAMA_FACTORY = {"lora": ({7: 16, 14: 32, 30: 64, 70: 160}, 2.0), "qlora": ({7: 6, 14: 12, 30: 24, 70: 48}, 0.5)}
PURE_BF16 = 8.0


@dataclass(frozen=True)
class Row:
    """One published peak and what each planner says, in bytes; None where a tool says nothing."""

    id: str
    model: str
    settings: str
    group: str
    published: float
    planned: float
    llama_factory: float
    accelerate: float | None
    source: str

    def error(self, planner: str) -> float | None:
        said = getattr(self, planner)
        return None if said is None else said / self.published - 1


def rows() -> list[Row]:
    found = json.loads(FILE.read_text(encoding="utf-8"))
    shapes = json.loads(SHAPES.read_text(encoding="utf-8")) | found["architectures"]
    return [_row(row, decoder(shapes[row["model"]]), found["stacks"][row["stack"]]) for row in found["rows"]]


def _row(row: dict[str, Any], arch: Architecture, stack: dict[str, Any]) -> Row:
    software = Stack(**{key: value for key, value in stack.items() if key != "why"})
    settings = {key: row[key] for key in SETTINGS if key in row}
    parts = predict(arch, Settings(row["method"], row["length"], row["batch"], stack=software, **settings))
    return Row(
        id=row["id"],
        model=row["model"].partition(",")[0],
        settings=f"{row['method']} {row['batch']}x{row['length']}",
        group=row["group"],
        published=row["peak"] * UNITS[row["unit"]],
        planned=measured(parts, row["measure"]),
        llama_factory=llama_factory(arch, row["method"]),
        accelerate=accelerate(arch, row["method"]),
        source=row["source"],
    )


def measured(parts: MemoryParts, measure: str) -> int:
    """What the source measured: tensors, what the allocator holds, or the whole card."""
    return {"allocated": parts.allocated, "reserved": parts.reserved, "card": parts.total}[measure]


def llama_factory(arch: Architecture, method: str) -> float:
    billions = arch.parameters / 1e9
    if method == "full":
        return PURE_BF16 * billions * 1e9
    table, each = LLAMA_FACTORY[method]
    near = [gigabytes for size, gigabytes in table.items() if abs(billions / size - 1) < 0.16]
    return (near[0] if near else each * billions) * 1e9


def accelerate(arch: Architecture, method: str) -> float | None:
    """'Training using Adam' of its float16 line; its int4 line says N/A."""
    usage = estimate_training_usage(arch.parameters * 4, "int4" if method == "qlora" else "float16")
    most = max(usage.values())
    return None if most < 0 else float(most)


def errors(found: Iterable[Row], planner: str) -> list[float]:
    """Absolute relative errors, where the planner says something."""
    return [abs(error) for row in found if (error := row.error(planner)) is not None]


def main() -> None:
    found = rows()
    print("| # | model | method, rows x tokens | published | planned | LLaMA-Factory | accelerate | source |")
    print("|---|---|---|--:|--:|--:|--:|---|")
    for row in found:
        cells = [f"{said} {row.error(name):+.0%}" if said else "N/A" for name, said in _said(row)]
        mark = "" if row.group == "known" else f" ({row.group})"
        print(
            f"| {row.id}{mark} | {row.model} | {row.settings} | {row.published / 1e9:.2f} | {' | '.join(cells)} | {row.source} |"
        )
    groups = {"counted: known and held out": [row for row in found if row.group != "outside"]}
    groups |= {name: [row for row in found if row.group == name] for name in ("known", "held out", "outside")}
    print("\n| rows | planner | n | median error | worst error |\n|---|---|--:|--:|--:|")
    for name, members in groups.items():
        for planner in ("planned", "llama_factory", "accelerate"):
            off = errors(members, planner)
            if off:
                print(f"| {name} | {planner} | {len(off)} | {statistics.median(off):.1%} | {max(off):.1%} |")
    for item in json.loads(FILE.read_text(encoding="utf-8"))["left_out"]:
        print(f"left out: {item['rows']} ({item['source']}): {item['reason']}")


def _said(row: Row) -> list[tuple[str, str]]:
    names = ("planned", "llama_factory", "accelerate")
    return [(name, "" if getattr(row, name) is None else f"{getattr(row, name) / 1e9:.2f}") for name in names]


if __name__ == "__main__":
    main()
