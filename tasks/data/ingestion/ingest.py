"""Stage 1: every record of every source becomes one row of an immutable snapshot, named by its content."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_contracts.data_reports import Snapshot, SourceFile
from data_contracts.data_spec import DataSpec
from data_contracts.errors import DataError, Problem
from data_contracts.jobs.data import PythonDocsJob
from data_contracts.rows import Rejection, SnapshotRow, conversation_as_json
from tasks.data.ingestion.core.formats import Converter, cluster_of, row_converter, slice_of
from tasks.data.ingestion.encodings import AUTO, resolve_encoding
from tasks.data.ingestion.preflight import probe
from tasks.data.ingestion.raw_rows import RawRow
from tasks.data.ingestion.readers import is_text, read_source
from tasks.data.ingestion.sources import Source, find_sources, local_copies
from tasks.runtime.processes import Display, run_worker
from tasks.runtime.store import Store, content_key, digest, draft_folder, publish_draft

# Rows in one part: what a later stage works on at once, and what it need not read again while it stays the same.
PART_ROWS = 20_000

_SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("source", pa.string()),
        ("line", pa.int64()),
        ("raw", pa.string()),
        ("messages", pa.string()),  # JSON pairs of role and text; null if the row was rejected
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("slice", pa.string()),  # the value of data.slice_field
        ("cluster", pa.string()),  # a hash of the value of data.cluster_field
    ]
)


def ingest_sources(store: Store, data: DataSpec) -> Snapshot:
    """Read all sources into one Parquet file. Raises DataError with the problems of all of them before any row.

    The id is the sha256 of every row's source name, line, raw text and what was understood of it: the same content
    gets the same id on any machine; other columns or another format of the same files give another id.
    """
    with draft_folder(store, "snapshots") as draft:
        sources = _ready_sources(store, data, draft)
        formats, problems = probe(sources, data)
        if problems:
            raise DataError(*problems)
        _log_encodings(sources, data)
        (draft / "parts").mkdir()
        files, found = _write(draft / "parts", sources, formats, data)
        rows_in = sum(file.rows for file, _ in files)
        if data.cluster_field:
            _check_clusters(data.cluster_field, found["alone"], rows_in - found["rejected"])
        snapshot_id = content_key(*(rows_digest for _, rows_digest in files))
        folder = publish_draft(store, "snapshots", draft, ["parts"], snapshot_id)
    return Snapshot(
        id=snapshot_id,
        parts=[store.ref(part) for part in sorted((folder / "parts").iterdir())],
        rows_in=rows_in,
        unreadable=found["rejected"],
        sources=[file for file, _ in files],
    )


def _ready_sources(store: Store, data: DataSpec, draft: Path) -> list[Source]:
    """Sources that can be read now: files are on this machine and builders have run."""
    sources, problems = find_sources(data)
    if problems:
        # What is wrong inside the files that were found belongs into the same message.
        readable = [source for source in sources if source.kind == "file"]
        raise DataError(*problems, *probe(readable, data)[1])
    sources = local_copies(store, sources)
    return [_build_python_docs(source, data, draft) if source.kind == "builtin" else source for source in sources]


def _build_python_docs(source: Source, data: DataSpec, draft: Path) -> Source:
    out = draft / source.name
    job = PythonDocsJob(
        packages=data.packages, max_lookup_rows=data.max_lookup_rows, max_summary_rows=data.max_summary_rows,
        max_rows_per_package=data.max_rows_per_package,
    )  # fmt: skip
    run_worker("tasks.data.ingestion.workers.build_python_docs", job, out)
    return replace(source, address=str(out / "rows.jsonl"))


def _log_encodings(sources: list[Source], data: DataSpec) -> None:
    """Log an encoding that was chosen and is not the usual one, with its reason."""
    with Display("ingest") as display:
        for source in filter(is_text, sources):
            encoding, reason = resolve_encoding(source.path, data.encoding)
            if data.encoding == AUTO and encoding != "utf-8":
                display.show({"event": "note", "text": f"{source.name}: {encoding} ({reason})"})


def _check_clusters(field: str, alone: int, rows: int) -> None:
    """A cluster field that no row has would silently split clusters, so it stops the run. Fewer rows are logged."""
    if rows and alone == rows:
        act = "name a field of your rows; dots reach into nested values"
        raise DataError(Problem(f"none of {rows:,} rows has a value in {field!r}", "data.cluster_field", act=act))
    if alone:
        text = f"{alone:,} of {rows:,} rows have no value in {field!r}: each of them stands alone"
        with Display("ingest") as display:
            display.show({"event": "note", "text": text})


def _write(
    parts: Path, sources: list[Source], formats: dict[str, str], data: DataSpec
) -> tuple[list[tuple[SourceFile, str]], Counter[str]]:
    """Stream all rows to disk. Returns each source with the digest of its rows, and how many rows were rejected or have no
    value in data.cluster_field.

    A part holds rows of one source, cut at fixed row numbers: what is appended to a file changes its last part only.
    """
    files: list[tuple[SourceFile, str]] = []
    found: Counter[str] = Counter()
    numbers = count()
    for source in sources:
        rows_hash, taken = hashlib.sha256(), 0
        rows = _rows(source, data, row_converter(formats[source.name], data.columns, data.system_prompt))
        while batch := list(islice(rows, PART_ROWS)):
            pq.write_table(as_table(batch), parts / f"{next(numbers):05}.parquet", compression="zstd")
            for row in batch:
                rows_hash.update(_identity(row))
            taken += len(batch)
            found["rejected"] += sum(row.messages is None for row in batch)
            found["alone"] += sum(row.messages is not None and row.cluster is None for row in batch)
        rows_digest = rows_hash.hexdigest()
        sha256 = rows_digest if source.kind == "hub" else digest(source.path)
        file = SourceFile(name=source.name, format=formats[source.name], rows=taken, sha256=sha256)
        files.append((file, rows_digest))
    return files, found


def _identity(row: SnapshotRow) -> bytes:
    """What of a row counts for the snapshot's id."""
    # Without the field the digest is what it was before there was one.
    groups = f"{row.slice or ''}\0{row.cluster}" if row.cluster else row.slice or ""
    return f"{row.source}\0{row.line}\0{row.row_id}\0{row.reason}\0{row.raw}\0{groups}\n".encode()


def snapshot_id_of(parts: list[Path], source_rows: Sequence[int]) -> str:
    """The id of a snapshot by what its parts hold. source_rows: how many rows each source has, in their order."""
    rows = (SnapshotRow(**row) for part in parts for row in pq.read_table(part).to_pylist())
    digests = []
    for rows_of_source in (*source_rows, None):  # what is left after the last source should be nothing
        rows_hash = hashlib.sha256()
        taken = 0
        for row in islice(rows, rows_of_source):
            rows_hash.update(_identity(row))
            taken += 1
        digests += [rows_hash.hexdigest()] if taken or rows_of_source is not None else []
    return content_key(*digests)


def _rows(source: Source, data: DataSpec, convert: Converter) -> Iterator[SnapshotRow]:
    fields = (data.slice_field, data.cluster_field)
    return (snapshot_row(source, row, convert, *fields) for row in read_source(source, data))


def snapshot_row(
    source: Source, row: RawRow, convert: Converter, slice_field: str | None = None, cluster_field: str | None = None
) -> SnapshotRow:
    """One record: its conversation, or why it has none."""
    value = row.value if isinstance(row.value, Rejection) else convert(row.value)
    name = _name(source, row)
    if isinstance(value, Rejection):
        # Without a conversation the raw text is all there is to name the row by.
        row_id = hashlib.sha256(row.raw.encode()).hexdigest()
        return SnapshotRow(
            row_id, name, row.line, row.raw, messages=None, reason=value.reason.value, detail=value.detail,
            slice=None, cluster=None,
        )  # fmt: skip
    item = {} if isinstance(row.value, Rejection) else row.value
    messages = conversation_as_json(value)
    return SnapshotRow(
        row_id=hashlib.sha256(messages.encode()).hexdigest(),
        source=name,
        line=row.line,
        raw=row.raw,
        messages=messages,
        reason=None,
        detail=None,
        slice=slice_of(item, slice_field),
        cluster=cluster_of(item, cluster_field),
    )


def _name(source: Source, row: RawRow) -> str:
    """A builder says itself which of its kinds of rows this is."""
    if source.kind == "builtin" and not isinstance(row.value, Rejection):
        return str(row.value["source"])
    return source.name


def as_table(rows: list[SnapshotRow]) -> pa.Table:
    columns = zip(*rows, strict=True)
    return pa.Table.from_arrays([pa.array(c, f.type) for c, f in zip(columns, _SCHEMA, strict=True)], schema=_SCHEMA)
