"""Every record of a source comes out once, in order, parsed or with the reason why not. Nothing is skipped."""

import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Final

from data_contracts.data_spec import DataSpec
from data_contracts.errors import DataError, InfrastructureError, Problem, TransientError
from data_contracts.rows import Reason, Rejection
from tasks.data.ingestion.encodings import AUTO, data_suffix, open_text, resolve_encoding
from tasks.data.ingestion.json_records import read_json_records
from tasks.data.ingestion.raw_rows import RawRow, decodes, undecodable
from tasks.data.ingestion.sources import Source

_DELIMITERS: Final = (",", ";", "\t", "|")
_SAMPLE_CHARS: Final = 1 << 18
_SAMPLE_RECORDS: Final = 50


def read_source(source: Source, data: DataSpec) -> Iterator[RawRow]:
    """All records of a file or hub data set. Raises DataError if the source as a whole cannot be read."""
    if source.kind == "hub":
        return _read_hub(source, data.hub_split)
    suffix = data_suffix(source.path)
    if suffix == ".parquet":
        return _read_parquet(source.path)
    encoding, _ = resolve_encoding(source.path, data.encoding)
    if suffix in (".csv", ".tsv"):
        return _read_csv(source.path, encoding, find_delimiter(source.path, encoding, data.delimiter))
    return read_json_records(source.path, encoding)


def is_text(source: Source) -> bool:
    return source.kind == "file" and data_suffix(source.path) != ".parquet"


def _read_csv(path: Path, encoding: str, delimiter: str) -> Iterator[RawRow]:
    csv.field_size_limit(sys.maxsize)  # the default of 128 KiB turns one long cell into an error
    taken: list[str] = []
    with open_text(path, encoding, newline="") as file:
        # strict: an unbalanced quote is an error instead of a cell that swallows the next records.
        reader = csv.reader(_noting(file, taken), delimiter=delimiter, strict=True)
        header = _csv_header(path, reader, delimiter)
        taken.clear()
        while True:
            line = reader.line_num + 1
            cells: list[str] | Rejection | None
            try:
                cells = next(reader, None)
            except csv.Error as error:
                cells = _broken_record(path, line, reader.line_num, error)
            raw = "".join(taken).rstrip("\r\n")
            taken.clear()
            if cells is None:
                return
            if not decodes(raw):
                yield undecodable(line, raw, encoding)
            elif isinstance(cells, Rejection):
                yield RawRow(line, raw, cells)
            elif len(cells) not in (0, len(header)):
                yield RawRow(line, raw, Rejection(Reason.UNPARSABLE, f"{len(cells)} cells, header has {len(header)}"))
            elif cells:
                yield RawRow(line, raw, dict(zip(header, cells, strict=True)))


def find_delimiter(path: Path, encoding: str, configured: str) -> str:
    """The column separator. `auto`: the one that gives the first records the header's number of columns.

    At least two columns are needed, and nine records in ten; half of them if a comma does not part the header at all.
    A comma where none or several others fit.
    """
    if data_suffix(path) == ".tsv":
        return "\t"
    if configured != AUTO:
        return configured
    csv.field_size_limit(sys.maxsize)
    with open_text(path, encoding, newline="") as file:
        text = file.read(_SAMPLE_CHARS)
    lines = list(io.StringIO(text, newline=""))
    whole_lines = len(lines) - (len(text) == _SAMPLE_CHARS)
    widths = {
        delimiter: [width for width in islice(_widths(lines, whole_lines, delimiter), _SAMPLE_RECORDS) if width]
        for delimiter in _DELIMITERS
    }
    share = 0.5 if widths[","][:1] == [1] else 0.9
    fitting = [delimiter for delimiter in _DELIMITERS if _fits(widths[delimiter], share)]
    return fitting[0] if len(fitting) == 1 else ","


def _fits(widths: list[int], share: float) -> bool:
    return bool(widths) and widths[0] >= 2 and widths.count(widths[0]) >= share * len(widths)


def _widths(lines: list[str], whole_lines: int, delimiter: str) -> Iterator[int]:
    """Cells of each record that ends in a whole line; 0 for an empty one, -1 for one with a broken quote."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while reader.line_num < whole_lines:
        try:
            width = len(next(reader))
        except csv.Error:
            width = -1
        if reader.line_num <= whole_lines:
            yield width


def _noting(lines: Iterator[str], taken: list[str]) -> Iterator[str]:
    """The same lines, noted in `taken`: csv does not give back a record's text."""
    for line in lines:
        taken.append(line)
        yield line


def _csv_header(path: Path, reader: "Iterator[list[str]]", delimiter: str) -> list[str]:
    try:
        header = next(reader, [])
    except csv.Error as error:
        act = "repair the quotes of the first line"
        raise DataError(Problem(f"the header cannot be read: {error}", f"{path}, line 1", act=act)) from error
    other = next((d for d in _DELIMITERS if d != delimiter and d in "".join(header)), None)
    if len(header) == 1 and other:
        what = f"the header is one column with {other!r} in it: the delimiter is not {delimiter!r}"
        raise DataError(Problem(what, str(path), act=_delimiter_act(path, other)))
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(Problem(f"columns named twice: {', '.join(twice)}", str(path), act="rename one of them"))
    return header


def _delimiter_act(path: Path, other: str) -> str:
    if path.suffix.lower() == ".tsv":
        return "rename the file to .csv"
    return "rename the file to .tsv" if other == "\t" else f"--set data.delimiter={other!r}"


def _broken_record(path: Path, line: int, last_line: int, error: csv.Error) -> Rejection:
    """A bad record is rejected; a quote that is never closed would hide many, so it stops the run."""
    if "unexpected end of data" in str(error) and last_line > line:
        what = f"a quote opened in line {line} is never closed: {last_line - line + 1} lines would count as one record"
        raise DataError(Problem(what, f"{path}, line {line}", act="close the quote")) from error
    return Rejection(Reason.UNPARSABLE, str(error)[:80])


def _read_parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        yield from _numbered(row for batch in file.iter_batches(batch_size=1000) for row in batch.to_pylist())
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(Problem(f"not a readable Parquet file: {str(error)[:120]}", str(path))) from error


def _numbered(rows: Iterator[Mapping[str, Any]]) -> Iterator[RawRow]:
    for number, row in enumerate(rows, start=1):
        yield RawRow(number, json.dumps(row, ensure_ascii=False, default=str), row)


def _read_hub(source: Source, split: str) -> Iterator[RawRow]:
    import datasets

    name = source.name
    try:
        rows = datasets.load_dataset(source.address, split=split, revision=source.version or None)
    except datasets.exceptions.DatasetNotFoundError as error:
        act = "check ORG/NAME@REVISION, and log in with `hf auth login` if it is private"
        raise DataError(Problem("no such data set on the hub", f"hub:{name}", act=act)) from error
    except ValueError as error:
        act = "choose another one with --set data.hub_split=NAME"
        raise DataError(
            Problem(f"split {split!r} cannot be read: {str(error)[:200]}", f"hub:{name}", act=act)
        ) from error
    except (OSError, RuntimeError) as error:
        act = "go online (unset HF_HUB_OFFLINE), or download the data set and give its files as data.source"
        what = f"the hub cannot be reached and no copy is cached: {str(error)[:200]}"
        # Offline mode is a decision, a failed connection is transient.
        kind = InfrastructureError if datasets.config.HF_HUB_OFFLINE else TransientError
        raise kind(Problem(what, f"hub:{name}", act=act)) from error
    yield from _numbered(iter(rows))
