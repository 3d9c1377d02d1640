"""Pre-flight checks: the first rows of every source show what is wrong with a whole file before any row is stored."""

import codecs
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from data_contracts.data_spec import DataSpec
from data_contracts.errors import DataError, Problem
from data_contracts.rows import Reason, Rejection
from tasks.data.ingestion.core.formats import check_columns, detect_format, row_converter
from tasks.data.ingestion.encodings import (
    AUTO,
    data_suffix,
    guess_encoding,
    mostly_undecodable,
    read_sample,
    resolve_encoding,
)
from tasks.data.ingestion.raw_rows import RawRow
from tasks.data.ingestion.readers import find_delimiter, is_text, read_source
from tasks.data.ingestion.sources import Source
from tasks.runtime.processes import Display

_ROWS = 100


def probe(sources: list[Source], data: DataSpec) -> tuple[dict[str, str], list[Problem]]:
    """The format of each source by name, and the problems of all of them.

    A delimiter that was found and is not the usual one is logged.
    """
    problems = _configuration_problems(data)
    if problems:
        return {}, problems
    formats: dict[str, str] = {}
    for source in sources:
        found = _byte_problems(source.path, data.encoding) if is_text(source) else []
        try:
            if not found:
                formats[source.name] = _format(source, data)
        except DataError as error:
            found = list(error.problems)
        problems += found
    if not problems:
        _log_delimiters(sources, data)
    return formats, problems


def _log_delimiters(sources: list[Source], data: DataSpec) -> None:
    files = [source for source in sources if is_text(source) and data_suffix(source.path) == ".csv"]
    with Display("probe") as display:
        for source in files if data.delimiter == AUTO else []:
            delimiter = find_delimiter(source.path, resolve_encoding(source.path, data.encoding)[0], AUTO)
            if delimiter != ",":
                reason = "it splits header and first rows into the same number of columns"
                display.show({"event": "note", "text": f"{source.name}: delimiter {delimiter!r} ({reason})"})


def _configuration_problems(data: DataSpec) -> list[Problem]:
    problems = [check_columns(data.columns)] if data.columns else []
    try:
        if data.encoding != AUTO:
            codecs.lookup(data.encoding)
    except LookupError:
        problems.append(Problem(f"unknown encoding {data.encoding!r}", "data.encoding", "a Python codec name"))
    return [problem for problem in problems if problem]


def _format(source: Source, data: DataSpec) -> str:
    where = source.address
    rows = list(islice(read_source(source, data), _ROWS))
    objects = [row.value for row in rows if not isinstance(row.value, Rejection)]
    if not rows:
        raise DataError(Problem("no rows in it", where, "at least one", "check that the export is complete"))
    if not objects:
        raise DataError(_nothing_readable(rows, where))
    if source.kind == "builtin":
        return "messages"
    name = "columns" if data.columns else data.format
    if name == "auto":
        return detect_format(objects, where)
    answers = [row_converter(name, data.columns, system_prompt=None)(item) for item in objects]
    if all(isinstance(answer, Rejection) and answer.reason is Reason.MISSING_FIELD for answer in answers):
        raise DataError(_nothing_matches(answers[0], objects[0], where))
    return name


def _nothing_matches(answer: object, item: Mapping[str, object], where: str) -> Problem:
    detail = answer.detail if isinstance(answer, Rejection) else ""
    act = "correct data.columns or data.format"
    return Problem(f"no row fits the configured columns or format: {detail}", where, f"fields: {', '.join(item)}", act)


def _nothing_readable(rows: list[RawRow], where: str) -> Problem:
    first = rows[0]
    rejection = first.value
    assert isinstance(rejection, Rejection)
    return Problem(
        f"none of the first {len(rows)} records can be read; line {first.line}: {rejection.reason} ({rejection.detail})",
        where,
        "JSON objects, one after the other or in one array",
        "write one object a line, or one array",
    )


def _byte_problems(path: Path, configured: str) -> list[Problem]:
    """Empty, packed and damaged, or hardly a line of the first 256 KiB decodes."""
    try:
        sample = read_sample(path)
        encoding, _ = resolve_encoding(path, configured)
    except DataError as error:
        return list(error.problems)
    if not sample.strip():
        return [Problem("the file is empty", str(path), act="check that the export is complete")]
    if not mostly_undecodable(sample, encoding):
        return []
    guess = guess_encoding(sample)
    act = "set data.encoding to the encoding it was saved in"
    if guess:
        act = f"--set data.encoding={guess} (a guess: look at some rows then)"
    return [Problem(f"hardly a line of it is {encoding}", str(path), act=act)]
