"""The data stages on files damaged at random: no row is lost, none has two fates, nothing ends in a traceback.

TUNEGATE_FUZZ_CASES=20000 TUNEGATE_FUZZ_SEED=3 pytest tests/test_fuzz.py --timeout=0 for a long run.
"""

import gzip
import json
import os
import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_contracts.data_reports import DatasetManifest, Snapshot
from data_contracts.errors import DataError
from data_contracts.run_spec import ContractSpec, CurateSpec, DataSpec, RulesSpec
from tasks.curate import curate
from tasks.dataset_files import SPLITS
from tasks.ingest import ingest
from tasks.stores import Store
from tasks.validate import validate
from tests.test_readers import damage, write

FILES_A_RUN = 200
CASES = int(os.environ.get("TUNEGATE_FUZZ_CASES", FILES_A_RUN))
# Everything is let through that does not concern single rows: what is looked for are rows that get lost.
LENIENT = ContractSpec(max_quarantine_rate=1.0, min_rows=1, max_duplicate_rate=1.0)
KEEPING = CurateSpec(test_fraction=0.3, max_near_duplicate_rate=1.0)


def rows(draw: random.Random) -> list[dict[str, str]]:
    """Rows of words that no other file has, some of them long, copied, private or nested."""
    made = []
    for _ in range(draw.randrange(3, 9)):
        words = [f"word{draw.randrange(10**6)}" for _ in range(draw.randrange(6, 30))]
        made.append({"prompt": f"What is {words[0]}?", "completion": " ".join(words) + "."})
    made.append(draw.choice(made))
    made.append(
        {"prompt": f"Who is {draw.random()}?", "completion": f"Write to p{draw.randrange(999)}@hospital.org, please."}
    )
    made.append({"prompt": "deep", "completion": "x" * draw.choice([1, 10_000]), "more": json.dumps([[{}]] * 9)})  # fmt: skip
    return made


def as_file(kind: str, made: list[dict[str, str]], folder: Path) -> tuple[str, bytes]:
    lines = "".join(json.dumps(row) + "\n" for row in made).encode()
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(made), folder / "whole.parquet")
        return "a.parquet", (folder / "whole.parquet").read_bytes()
    if kind in ("csv", "tsv"):
        mark = "," if kind == "csv" else "\t"
        return f"a.{kind}", "".join(
            f'"{a}"{mark}"{b}"\n'
            for a, b in [("prompt", "completion"), *((r["prompt"], r["completion"]) for r in made)]
        ).encode()
    return {
        "jsonl": ("a.jsonl", lines),
        "json": ("a.json", json.dumps(made, indent=len(made) % 2 or None).encode()),
        "gz": ("a.jsonl.gz", gzip.compress(lines)),
        "zst": ("a.jsonl.zst", pa.Codec("zstd").compress(lines, asbytes=True)),
        "utf16": ("a.jsonl", lines.decode().encode("utf-16-le")),
    }[kind]


def readable(store: Store, sources: list[str]) -> tuple[Snapshot, int]:
    """The snapshot of all files that can be read as a whole, and how many were refused with their name."""
    refused = 0
    while True:
        try:
            return ingest(store, DataSpec(source=sources)), refused
        except DataError as error:
            told = " ".join(f"{problem.where} {problem.what}" for problem in error.problems)
            named = [source for source in sources if "/".join(Path(source).parts[-2:]) in told]
            assert named, told
            refused += len(named)
            sources = [source for source in sources if source not in named]


def places(store: Store, dataset: DatasetManifest) -> Counter[tuple[str, int]]:
    """Where every row of the data set came from."""
    refs = [*(getattr(dataset, split) for split in SPLITS), dataset.duplicate_rows, dataset.quarantine]
    lines = [json.loads(line) for ref in refs for line in store.path(ref).read_text(encoding="utf-8").splitlines()]
    return Counter((line["source"], line["line"]) for line in lines)


def test_no_damaged_file_makes_a_row_vanish_or_come_twice(tmp_path: Path) -> None:
    draw = random.Random(int(os.environ.get("TUNEGATE_FUZZ_SEED", "5")))
    seen = Counter[str]()
    for run in range(-(-CASES // FILES_A_RUN)):
        folder, store = tmp_path / f"run{run}", Store(tmp_path / f"store{run}")
        good = [
            {"prompt": f"What is good{i}?", "completion": f"It is good{i}, and {draw.random()}."} for i in range(60)
        ]
        sources = [write(folder, "good/good.jsonl", "".join(json.dumps(row) + "\n" for row in good))]
        for case in range(min(FILES_A_RUN, CASES)):
            kind = draw.choice(["jsonl", "json", "csv", "tsv", "gz", "zst", "parquet", "utf16"])
            name, whole = as_file(kind, rows(draw), folder)
            sources.append(write(folder, f"case{case:05}/{name}", damage(whole, draw)))
        snapshot, refused = readable(store, sources)
        dataset = curate(store, validate(store, snapshot, RulesSpec(), LENIENT, []), KEEPING, "model")
        came_in = Counter(
            (row["source"], row["line"])
            for part in snapshot.parts
            for row in pq.read_table(store.path(part), columns=["source", "line"]).to_pylist()
        )
        assert places(store, dataset) == came_in
        assert dataset.rows_in == dataset.kept + dataset.quarantined + dataset.duplicates == came_in.total()
        seen.update({"refused": refused, "rows": dataset.rows_in}, **dataset.reasons)
    assert 0 < seen["refused"] < CASES
    assert seen["unparsable"] > 0
