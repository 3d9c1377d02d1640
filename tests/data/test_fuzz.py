"""Whatever is in the files: every row that comes in is found again in one file of the data set, with a reason if rejected."""

import gzip
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_contracts.data_reports import DatasetManifest, FileRef, Snapshot
from data_contracts.data_spec import ContractSpec, CurateSpec, DataSpec, RulesSpec
from data_contracts.errors import DataError
from data_contracts.rows import Reason
from tasks.data.curation.curate import Curation, curate_rows
from tasks.data.ingestion.ingest import ingest_sources
from tasks.data.ingestion.readers import read_source
from tasks.data.ingestion.sources import Source
from tasks.data.validation.validate import Checks, validate
from tasks.runtime.store import Store
from tests.support.mutations import damage

CASES = int(os.environ.get("TUNEGATE_FUZZ_CASES", "120"))
SEED = int(os.environ.get("TUNEGATE_FUZZ_SEED", "11"))
FILES_IN_ONE_RUN = 200
WORDS = ["router", "button", "light", "cable", "screen", "battery", "café", "naïve", "高血压", "党参", "straße"]
Rows = list[dict[str, str]]


def rows_of(draw: random.Random) -> Rows:
    """Rows of their own, and some that other files have too."""
    own = [f"{draw.randrange(10**6)}" for _ in range(draw.randrange(3, 9))]
    numbers = [*own, *(str(draw.randrange(8)) for _ in range(2))]
    return [{"prompt": f"What about case {n}?", "completion": sentence(random.Random(n), n)} for n in numbers]


def sentence(draw: random.Random, number: str) -> str:
    return f'In case {number} check the {" ".join(draw.choices(WORDS, k=12))}, then "go" on; or, stop.'


def as_lines(rows: Rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_table(rows: Rows, delimiter: str) -> str:
    quoted = [[f'"{text}"' for text in (value.replace('"', '""') for value in row.values())] for row in rows]
    return "".join(delimiter.join(cells) + "\n" for cells in [["prompt", "completion"], *quoted])


def as_parquet(rows: Rows) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


FORMATS: dict[str, Callable[[Rows], bytes]] = {
    "lines.jsonl": lambda rows: as_lines(rows).encode(),
    "array.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "flat.json": lambda rows: json.dumps(rows, ensure_ascii=False).encode(),
    "pretty.jsonl": lambda rows: "\n".join(json.dumps(row, indent=2) for row in rows).encode(),
    "commas.csv": lambda rows: as_table(rows, ",").encode(),
    "semicolons.csv": lambda rows: as_table(rows, ";").encode(),
    "tabs.tsv": lambda rows: as_table(rows, "\t").encode(),
    "packed.jsonl.gz": lambda rows: gzip.compress(as_lines(rows).encode()),
    "packed.csv.zst": lambda rows: pa.Codec("zstd").compress(as_table(rows, ",").encode(), asbytes=True),
    "table.parquet": as_parquet,
    "wide.jsonl": lambda rows: as_lines(rows).encode("utf-16-le"),
    "gbk.csv": lambda rows: as_table(rows, ",").encode("gb18030"),
}


def junk(rows: Rows, draw: random.Random) -> Rows:
    """Rows that are strange before any byte is damaged."""
    strange = [
        "", "\0", "x" * 200_000, "\ufeff", "\u2028\x85\x1c", "<|im_start|>", "=1+1", "\ud83d\ude00 ok \U0001f600",
        "[" * 500, '{"a": ' * 300, "NaN", "null", "\r", "\r\n\t", "e\u0301" * 9, "\u202e\u200b", "é高".encode().decode("latin-1"),
    ]  # fmt: skip
    changed = [dict(row) for row in rows]
    for row in draw.sample(changed, draw.choice([0, 0, 1, 2])):
        text = draw.choice(strange)
        row[draw.choice(["prompt", "completion"])] = text.encode("utf-16", "surrogatepass").decode("utf-16")
    return changed


def disorder(content: bytes, draw: random.Random) -> bytes:
    """Lines swapped, fields named twice, values of another type, zeros, a tail of another file or encoding."""
    lines = content.split(b"\n")
    accident = draw.randrange(8)
    if accident == 0:
        draw.shuffle(lines)
    elif accident == 1:
        lines.insert(draw.randrange(len(lines) + 1), draw.choice(lines))
    content = b"\n".join(lines)
    if accident == 2:
        content = content.replace(b'"completion"', b'"prompt"', draw.randrange(1, 4))
    elif accident == 3:
        value = draw.choice([b"NaN", b"-Infinity", b"1" * 5000, b"[[[]]]", b'{"a": {"b": [1, {}]}}', b"null", b"1e999"])
        content = content.replace(b'"What about', value + b', "b": "What about', 1)
    elif accident == 4:
        content += b"\0" * draw.randrange(1, 600)
    elif accident == 5:
        content += draw.choice(
            [b'{"prompt": [', b"[1, 2", b'"', "\né".encode("latin-1"), "高".encode("utf-16"), b"\x1f\x8b"]
        )
    return content


def write_files(folder: Path, count: int, draw: random.Random) -> list[Path]:
    """Damaged files of all formats, and one that is whole."""
    folder.mkdir(parents=True)
    whole = folder / "whole.jsonl"
    whole.write_bytes(FORMATS["lines.jsonl"](rows_of(draw) * 2 + rows_of(draw) + rows_of(draw)))
    files = [whole]
    for number in range(count):
        name = list(FORMATS)[number % len(FORMATS)]
        content = disorder(FORMATS[name](junk(rows_of(draw), draw)), draw)
        files.append(folder / f"{number:05}-{name}")
        files[-1].write_bytes(damage(content, draw) if draw.random() < 0.8 else content)
    return files


def is_unreadable(path: str) -> bool:
    try:
        list(read_source(Source("", "file", path), DataSpec()))
    except DataError:
        return True
    return False


def ingest_readable(store: Store, files: list[Path]) -> Snapshot:
    """Leave out the files that are wrong as a whole: each error has to name some."""
    left = {str(path) for path in files}
    while True:
        try:
            return ingest_sources(store, DataSpec(source=sorted(left)))
        except DataError as error:
            named = {file for file in left for problem in error.problems if problem.where.startswith(file)}
            assert named, error
            assert str(files[0]) not in named, error
            # Damage deep in a file is reported when it is reached: one file at a time.
            left -= named | set(filter(is_unreadable, left))


def lines(store: Store, ref: FileRef) -> list[dict[str, str]]:
    return [json.loads(line) for line in store.path(ref).read_bytes().splitlines()]


def check_sums(store: Store, snapshot: Snapshot, dataset: DatasetManifest) -> None:
    def place(row: dict[str, str]) -> tuple[str, str, str]:
        return row["source"], row["line"], row["row_id"]

    came_in = [row for part in snapshot.parts for row in pq.read_table(store.path(part)).to_pylist()]
    kept = [row for name in ("train", "validation", "test") for row in lines(store, getattr(dataset, name))]
    quarantined, duplicates = lines(store, dataset.quarantine), lines(store, dataset.duplicate_rows)
    assert (len(kept), len(quarantined), len(duplicates)) == (dataset.kept, dataset.quarantined, dataset.duplicates)
    assert len(came_in) == dataset.rows_in == dataset.kept + dataset.quarantined + dataset.duplicates
    assert Counter(map(place, came_in)) == Counter(map(place, [*kept, *quarantined, *duplicates]))
    assert Counter(Reason(row["reason"]).value for row in quarantined) == dataset.reasons
    assert not [row for row in came_in if row["source"] == "whole.jsonl" and row["reason"]]


def test_every_row_of_damaged_files_is_found_in_one_file_of_the_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TUNEGATE_FUZZ_CASES=20000 for a long run."""
    monkeypatch.setattr("tasks.runtime.partitions.free_cores", lambda: 1)  # no second for each process
    draw = random.Random(SEED)
    read_through = 0
    for first in range(0, CASES, FILES_IN_ONE_RUN):
        here = tmp_path / str(first)
        files = write_files(here / "raw", min(FILES_IN_ONE_RUN, CASES - first), draw)
        store = Store(here / "store")
        snapshot = ingest_readable(store, files)
        budgets = ContractSpec(max_quarantine_rate=1.0, max_duplicate_rate=1.0, min_rows=1)
        validated = validate(store, snapshot, Checks(RulesSpec(), budgets))
        dataset = curate_rows(store, validated, Curation(CurateSpec(test_fraction=0.3), "model"))
        check_sums(store, snapshot, dataset)
        assert min(dataset.kept, dataset.quarantined, dataset.duplicates) > 0
        read_through += len(snapshot.sources)
        shutil.rmtree(here)
    assert read_through > CASES / 3
