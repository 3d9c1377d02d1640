"""Every record of every file type comes out once; what is wrong with whole files is said all at once."""

import gzip
import json
import os
import random
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_contracts.data_spec import DataSpec
from data_contracts.errors import DataError, InfrastructureError
from data_contracts.rows import Rejection
from flows.config.init_spec import write_preset
from tasks.data.ingestion.encodings import open_text, resolve_encoding
from tasks.data.ingestion.ingest import ingest_sources
from tasks.data.ingestion.raw_rows import RawRow, printable
from tasks.data.ingestion.readers import read_source
from tasks.data.ingestion.sources import Source, find_sources, source_digests
from tasks.runtime.store import Store
from tests.support.mutations import damage

GOOD = {"prompt": "hi", "completion": "hello"}
LINE = json.dumps(GOOD) + "\n"


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def read(path: str, **data: Any) -> list[RawRow]:
    return list(read_source(Source(Path(path).name, "file", path), DataSpec(source=[path], **data)))


def reasons(rows: list[RawRow]) -> list[str | None]:
    return [row.value.reason.value if isinstance(row.value, Rejection) else None for row in rows]


def message(tmp_path: Path, *sources: str, **data: Any) -> str:
    with pytest.raises(DataError) as caught:
        ingest_sources(Store(tmp_path / "store"), DataSpec(source=list(sources), **data))
    assert not list((tmp_path / "store").rglob("*.parquet"))
    return str(caught.value)


def test_the_same_rows_come_out_of_every_file_type(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([GOOD, GOOD]), tmp_path / "a.parquet")
    files = [
        write(tmp_path, "a.jsonl", LINE * 2),
        write(tmp_path, "lines.json", LINE * 2),
        write(tmp_path, "array.json", json.dumps([GOOD, GOOD])),
        write(tmp_path, "a.csv", "prompt,completion\r\nhi,hello\r\nhi,hello\r\n"),
        write(tmp_path, "a.tsv", "prompt\tcompletion\nhi\thello\nhi\thello\n"),
        write(tmp_path, "bom.jsonl", b"\xef\xbb\xbf" + LINE.encode() * 2),
        write(tmp_path, "bom.csv", b"\xef\xbb\xbfprompt,completion\nhi,hello\n\nhi,hello\n"),
        str(tmp_path / "a.parquet"),
    ]
    for file in files:
        assert [row.value for row in read(file)] == [GOOD, GOOD], file


def test_every_line_that_is_not_blank_is_a_row_with_its_line_number_and_reason(tmp_path: Path) -> None:
    lines = [LINE.encode(), b"\r\n", b'{"prompt": "\xff"}\n', b'{"prompt": "\\ud800"}\n', b'{"a": NaN}\n', b"[1]\n"]
    deep = b"[" * 100_000 + b"\n"
    rows = read(write(tmp_path, "a.jsonl", b"".join([*lines, deep, b'{"prompt": "cut'])))
    assert [row.line for row in rows] == [1, 3, 4, 5, 6, 7, 8]
    assert reasons(rows) == [
        None, "undecodable", "undecodable", "unparsable", "not_an_object", "unparsable", "unparsable",
    ]  # fmt: skip
    assert all(row.raw.encode() for row in rows)


def test_line_separators_inside_a_text_do_not_end_a_row_and_emoji_escapes_are_no_lone_surrogates(
    tmp_path: Path,
) -> None:
    item = {"prompt": "a\u2028b", "completion": "\U0001f600"}
    rows = read(write(tmp_path, "a.jsonl", json.dumps(item, ensure_ascii=False) + "\n" + json.dumps(item) + "\n"))
    assert [row.value for row in rows] == [item, item]


def test_csv_records_keep_their_raw_text_and_bad_ones_are_rejected(tmp_path: Path) -> None:
    text = b'prompt,completion\n"a""b","c\nd"\nx,"y"z\np,q,r\nshort\n\xff,x\nhi,hello\n'
    rows = read(write(tmp_path, "a.csv", text))
    assert [row.line for row in rows] == [2, 4, 5, 6, 7, 8]
    assert reasons(rows) == [None, "unparsable", "unparsable", "unparsable", "undecodable", None]
    assert rows[0].value == {"prompt": 'a"b', "completion": "c\nd"}
    assert rows[0].raw == '"a""b","c\nd"'


def test_a_long_cell_is_no_error(tmp_path: Path) -> None:
    (row,) = read(write(tmp_path, "a.csv", f"prompt,completion\nhi,{'x' * 200_000}\n"))
    assert not isinstance(row.value, Rejection)


def test_items_of_an_array_are_rejected_one_by_one(tmp_path: Path) -> None:
    text = '[{"prompt": "hi", "completion": "hello"}, 5, {"prompt": Infinity}, {"prompt": "\\ud800"}]'
    rows = read(write(tmp_path, "a.json", text))
    assert [row.line for row in rows] == [1, 2, 3, 4]
    assert reasons(rows) == [None, "not_an_object", "unparsable", "undecodable"]


def test_other_encodings_are_read_when_named(tmp_path: Path) -> None:
    text = json.dumps({"prompt": "高血压", "completion": "党参"}, ensure_ascii=False) + "\n"
    encodings = ("gb18030", "utf-16", "big5")
    for encoding in encodings:
        content = text.replace("压", "壓").replace("党", "黨").replace("参", "參").encode(encoding)
        assert reasons(read(write(tmp_path, f"{encoding}.jsonl", content), encoding=encoding)) == [None]


def test_the_encoding_of_a_file_is_found_and_its_reason_told(tmp_path: Path) -> None:
    chinese = "".join(
        json.dumps(
            {"prompt": f"高血压患者能吃党参吗第{i}问", "completion": "高血压病人可以口服党参的"}, ensure_ascii=False
        )
        + "\n"
        for i in range(30)
    )
    found = {
        "utf-8": "most of its records",
        "utf-16": "byte order mark",
        "utf-32": "byte order mark",
        "gb18030": "guess",
    }
    for encoding, reason in found.items():
        path = write(tmp_path, f"{encoding}.jsonl", chinese.encode(encoding))
        assert resolve_encoding(Path(path), "auto")[0] == encoding
        assert reason in resolve_encoding(Path(path), "auto")[1]
        assert reasons(read(path)) == [None] * 30
    mixed = write(tmp_path, "mixed.jsonl", LINE.encode() * 3 + b'{"prompt": "\xff", "completion": "b"}\n')
    assert reasons(read(mixed)) == [None, None, None, "undecodable"]


FOREIGN = {
    "gb18030": {"prompt": "高血压患者能吃党参吗", "completion": "高血压病人可以口服党参的"},
    "cp1252": {"prompt": "Où êtes-vous né ?", "completion": "L'élève a mangé des pâtes à l'école, ça va."},
}


@pytest.mark.parametrize("encoding", FOREIGN)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_an_encoding_that_shows_only_after_a_long_ascii_head_is_found(
    tmp_path: Path, encoding: str, suffix: str
) -> None:
    line = json.dumps(FOREIGN[encoding], ensure_ascii=False) + "\n"
    ascii_rows = -(-300_000 // len(LINE))
    content = (LINE * ascii_rows + line * 40 + LINE * ascii_rows).encode(encoding)
    path = write(tmp_path, "a.jsonl" + suffix, gzip.compress(content) if suffix else content)
    assert resolve_encoding(Path(path), "auto")[0] == encoding
    values = [row.value for row in read(path)]
    assert len(values) == 2 * ascii_rows + 40
    assert values.count(FOREIGN[encoding]) == 40


def test_an_array_on_one_line_tells_its_encoding_beyond_its_first_mebibyte(tmp_path: Path) -> None:
    rows = [GOOD] * 40_000 + [FOREIGN["gb18030"]] * 30
    path = write(tmp_path, "a.json", json.dumps(rows, ensure_ascii=False).encode("gbk"))
    assert resolve_encoding(Path(path), "auto")[0] == "gb18030"


def test_a_few_damaged_lines_do_not_change_the_encoding_of_a_file(tmp_path: Path) -> None:
    damaged = b'{"prompt": "caf\xe9", "completion": "b"}\n'
    rows = read(write(tmp_path, "a.jsonl", LINE.encode() * 100 + damaged * 19))
    assert reasons(rows) == [None] * 100 + ["undecodable"] * 19


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", [*FOREIGN, "ascii"])
def test_utf_16_without_a_mark_is_found(tmp_path: Path, encoding: str, text: str) -> None:
    line = json.dumps(FOREIGN.get(text, GOOD), ensure_ascii=False) + "\n"
    assert reasons(read(write(tmp_path, "a.jsonl", (line * 3).encode(encoding)))) == [None] * 3
    array = json.dumps([FOREIGN.get(text, GOOD)] * 3, ensure_ascii=False)
    assert reasons(read(write(tmp_path, "one_line.json", array.encode(encoding)))) == [None] * 3
    table = "question,answer\n" + "高血压,党参\n" * 3
    assert len(read(write(tmp_path, "a.csv", table.encode(encoding)))) == 3


def test_one_byte_that_is_wrong_rejects_one_record_of_an_array_on_one_line(tmp_path: Path) -> None:
    content = json.dumps([FOREIGN["gb18030"]] * 9, ensure_ascii=False).encode()
    path = write(tmp_path, "a.json", content.replace("党".encode(), b"\xff", 1))
    assert ingest_sources(Store(tmp_path / "store"), DataSpec(source=[path])).unreadable == 1
    assert reasons(read(path)) == ["undecodable"] + [None] * 8


def test_zeros_in_a_file_do_not_make_it_utf_16(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", LINE.encode() * 3 + b"\0a\0b\0c\0d\n" + LINE.encode() + b"\0" * 512)
    assert resolve_encoding(Path(path), "auto")[0] == "utf-8"
    assert reasons(read(path)) == [None] * 3 + ["unparsable", None, "unparsable"]


def test_a_mark_in_the_middle_of_a_file_does_not_make_it_utf_16(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", b"[\n\xff\xfe\xe9\x00\xd8\x9a")
    assert resolve_encoding(Path(path), "auto")[0] == "utf-8"
    assert reasons(read(path)) == ["undecodable"]


def test_a_long_utf_16_file_is_not_taken_for_undecodable_where_its_sample_ends(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", (LINE * 4000).encode("utf-16"))
    assert ingest_sources(Store(tmp_path / "store"), DataSpec(source=[path])).unreadable == 0


# --- what parts the columns -----------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_of_a_csv_is_found_from_its_header_and_first_rows(tmp_path: Path, delimiter: str) -> None:
    cells = [["prompt", "completion"], ['a, b; "c" | d', "x\ny"], ["1,5", "2;5"], ["e,f", "g;h|i"], ["j", "k"]]
    quoted = [['"' + cell.replace('"', '""') + '"' for cell in row] for row in cells]
    path = write(tmp_path, "a.csv", "".join(delimiter.join(row) + "\n" for row in quoted))
    rows = read(path)
    assert [list(row.value.values()) for row in rows] == cells[1:]  # type: ignore[union-attr]


def test_a_delimiter_in_doubt_is_a_comma_and_a_named_one_overrules(tmp_path: Path) -> None:
    both = write(tmp_path, "both.csv", "prompt,completion;x\na,b;c\n")
    assert read(both)[0].value == {"prompt": "a", "completion;x": "b;c"}
    assert read(both, delimiter=";")[0].value == {"prompt,completion": "a,b", "x": "c"}
    commas = write(tmp_path, "commas.csv", "prompt;x,completion\n" + "a;b;c,d\n" * 9 + "a;b\n")
    assert len(read(commas)) == 10
    assert read(commas)[0].value == {"prompt;x": "a;b;c", "completion": "d"}
    tabs = write(tmp_path, "tabs.tsv", "prompt;x\tcompletion\na;b\tc\n")
    assert read(tabs)[0].value == {"prompt;x": "a;b", "completion": "c"}


def test_one_broken_record_in_ten_does_not_hide_the_delimiter(tmp_path: Path) -> None:
    rows = read(write(tmp_path, "a.csv", "prompt;completion\n" + "a, b;c\n" * 9 + "broken\n"))
    assert reasons(rows) == [None] * 9 + ["unparsable"]
    rows = read(write(tmp_path, "b.csv", "prompt, short;completion\n" + "a;c, d, e\n" * 9 + "broken\n"))
    assert reasons(rows) == [None] * 9 + ["unparsable"]
    few = write(tmp_path, "few.csv", "prompt;completion\na, b;c\nbroken\n")
    assert reasons(read(few)) == [None, "unparsable"]


def test_a_delimiter_that_was_found_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    semicolons = write(tmp_path, "semi.csv", "prompt;completion\na;b\n")
    commas = write(tmp_path, "commas.csv", "prompt,completion\na,b\n")
    ingest_sources(Store(tmp_path / "store"), DataSpec(source=[semicolons, commas]))
    logged = capfd.readouterr().err
    assert "semi.csv: delimiter ';'" in logged
    assert "commas.csv" not in logged


def test_init_writes_a_preset_for_a_csv_with_semicolons(tmp_path: Path) -> None:
    path = write(tmp_path, "semi.csv", "question;answer\nIs it a, or b?;It is b.\n")
    look = write_preset(tmp_path / "my.yaml", path, None, None, [])
    assert (look.sample.counts, look.sample.unreadable) == ({"semi.csv": 1}, 0)
    assert look.columns == {"prompt": "question", "completion": "answer"}
    assert look.example["question"] == "Is it a, or b?"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_packed_files_are_read_and_a_damaged_one_stops_the_run(tmp_path: Path, suffix: str) -> None:
    pack = gzip.compress if suffix == ".gz" else partial(pa.Codec("zstd").compress, asbytes=True)
    many = "".join(json.dumps({"prompt": f"q{i}", "completion": f"{i * i}" * 9}) + "\n" for i in range(3000)).encode()
    for name, content in (("a.jsonl", LINE.encode() * 2), ("a.json", f"[{LINE},{LINE}]".encode())):
        assert reasons(read(write(tmp_path, name + suffix, pack(content)))) == [None, None]
    whole = write(tmp_path, "rows.csv" + suffix, pack(b"prompt,completion\nhi,hello\n"))
    assert [source.name for source in find_sources(DataSpec(source=[whole]))[0]] == [f"rows.csv{suffix}"]
    cut = write(tmp_path, "cut.jsonl" + suffix, pack(many)[:-40])
    with pytest.raises(DataError, match="damaged or cut"):
        read(cut)


def test_an_array_is_read_item_by_item_and_one_broken_item_is_rejected_alone(tmp_path: Path) -> None:
    items = ['{\n    "prompt": "a",\n    "completion": "b"\n  }', '{\n    "prompt" 1\n  }', LINE.strip()]
    lines = write(tmp_path, "lines.json", "[\n  " + ",\n  ".join(items) + "\n]\n")
    assert reasons(read(lines)) == [None, "unparsable", None]
    flat = write(tmp_path, "flat.json", '[{"prompt": "a"}, {"prompt" 1}, {"prompt": "c"}, 7]')
    assert reasons(read(flat)) == [None, "unparsable", None, "not_an_object"]
    cut = write(tmp_path, "cut.json", f'[{LINE},{LINE},{{"prompt": "half')
    assert reasons(read(cut)) == [None, None, "unparsable"]
    nested = json.dumps([{"conversations": [{"from": "human", "value": "x" * 3000}] * 9} for _ in range(60)])
    assert reasons(read(write(tmp_path, "nested.json", nested))) == [None] * 60
    big = write(tmp_path, "big.json", json.dumps([{"prompt": "x" * 700_000, "completion": str(i)} for i in range(5)]))
    assert [row.value["completion"] for row in read(big)] == list("01234")  # type: ignore[index]


def test_records_that_span_lines_come_out_once_with_the_line_where_they_start(tmp_path: Path) -> None:
    pretty = json.dumps(GOOD | {"tags": [{"a": 1}, {}]}, indent=2)
    for name, text in {
        "a.jsonl": f"{pretty}\n{pretty}\n\n{LINE}",
        "a.json": f"{pretty}\n{pretty}\n\n{LINE}",
        "glued.ndjson": f"{pretty}{pretty}\n\n\n{LINE}",
        "by_comma.json": f"{pretty},\n{pretty},\n\n{LINE}",
    }.items():
        rows = read(write(tmp_path, name, text))
        assert reasons(rows) == [None] * 3
        start = 10 if name == "glued.ndjson" else 11
        assert [row.line for row in rows] == [1, start, 22], name
        assert rows[1].raw == pretty
    one_line = write(tmp_path, "one.json", json.dumps(GOOD) * 3)
    assert [(row.line, row.value) for row in read(one_line)] == [(1, GOOD)] * 3


def test_the_content_tells_an_array_from_lines_whatever_the_file_is_called(tmp_path: Path) -> None:
    pretty = json.dumps([GOOD, GOOD, 5], indent=2)
    for text in (json.dumps([GOOD, GOOD, 5]), pretty, json.dumps([GOOD, GOOD, 5], indent=0)):
        assert reasons(read(write(tmp_path, "a.jsonl", text))) == [None, None, "not_an_object"]
    assert reasons(read(write(tmp_path, "two.json", pretty + pretty))) == [None, None, "not_an_object"] * 2
    assert reasons(read(write(tmp_path, "more.json", pretty + "\nmore"))) == [None, None, "not_an_object", "unparsable"]
    one_line = json.dumps([GOOD, GOOD, 5]) + "\n"
    assert reasons(read(write(tmp_path, "lines.json", one_line * 2))) == [None, None, "not_an_object"] * 2
    lists = write(tmp_path, "lists.json", '["q", {"a": 1}]\n["q", "a"]\n')
    assert reasons(read(lists)) == ["not_an_object"] * 2
    assert reasons(read(write(tmp_path, "first.jsonl", '[{"a": 1}]\n' + LINE * 2))) == ["not_an_object", None, None]
    assert (
        reasons(read(write(tmp_path, "talks.json", '[[{"role": "user"}], [{"role": "x"}]]'))) == ["not_an_object"] * 2
    )
    rows = read(write(tmp_path, "cut.jsonl", f'["cut\n\n{LINE}{LINE}'))
    assert [(row.line, isinstance(row.value, Rejection)) for row in rows] == [(1, True), (3, False), (4, False)]


def test_a_broken_record_of_many_lines_is_one_row_and_the_next_record_is_read(tmp_path: Path) -> None:
    broken = '{\n  "prompt": "a",\n  "tags": [\n    {"b": 1},\n    {"c" 2}\n  ]\n}'
    pretty = json.dumps(GOOD, indent=2)
    rows = read(write(tmp_path, "a.json", f"{pretty}\n{broken}\n{pretty}{broken}{pretty}"))
    assert reasons(rows) == [None, "unparsable", None, "unparsable", None]
    assert [rows[1].raw, rows[3].raw] == [broken, broken]
    assert isinstance(rows[1].value, Rejection) and "line 5 of it, column 10" in rows[1].value.detail
    headless = pretty.removeprefix("{\n")
    rows = read(write(tmp_path, "b.json", f"{pretty}\n{headless}\n{pretty}\n"))
    assert reasons(rows) == [None, "unparsable", None]
    endless = pretty.removesuffix("\n}") + ","
    rows = read(write(tmp_path, "c.json", f"{endless}\n{pretty}\n{pretty}\n"))
    assert [row.line for row in rows if not isinstance(row.value, Rejection)] == [4, 8]


@pytest.mark.parametrize(
    "cut", ['{"prompt": ', '{"prompt": [', '{"prompt": "a",', '{"a": {', '{"prompt": "q', "{", "x, ["]
)
def test_a_line_that_was_cut_swallows_no_good_line_below(tmp_path: Path, cut: str) -> None:
    rows = read(write(tmp_path, "a.jsonl", LINE + cut + "\n" + LINE * 3))
    assert reasons(rows) == [None, "unparsable", None, None, None]
    assert rows[1].raw == cut.strip()


def test_no_broken_record_takes_in_the_good_ones_below_even_where_the_brackets_fit(tmp_path: Path) -> None:
    open_, close = '{"prompt": "a", "completion": "b", "tags": [', '{"prompt": "c", "completion": "d"}]}'
    lines = write(tmp_path, "a.json", f"{open_}\n{LINE.strip()},\n{close}\n{LINE}")
    assert [row.raw for row in read(lines)].count(LINE.strip()) == 2
    array = write(tmp_path, "b.json", f"[{LINE.strip()},\n{open_}\n{LINE.strip()},\n{close}]")
    assert [row.raw for row in read(array)].count(LINE.strip()) == 2


def test_two_records_run_together_by_a_lost_line_end_are_told_apart(tmp_path: Path) -> None:
    half = '{"prompt": "hi", "completion": "hel'
    rows = read(write(tmp_path, "a.jsonl", LINE + half + LINE + LINE.strip() + LINE))
    assert reasons(rows) == [None, "unparsable", None, None, None]
    assert rows[1].raw == half
    other_fields = write(tmp_path, "c.jsonl", '{"a": "x"}{"b": "y"}{"c" "z"}{"d": "z"}\n')
    assert reasons(read(other_fields)) == [None, None, "unparsable", None]
    junk = LINE.strip() + ' and "more"}\n'
    assert reasons(read(write(tmp_path, "b.jsonl", LINE + junk + LINE))) == [None, "unparsable", None]


def test_what_a_broken_item_leaves_behind_ends_no_array(tmp_path: Path) -> None:
    item = json.dumps({"messages": [{"role": "user"}, {"role": "assistant"}]})
    flat = write(tmp_path, "a.json", f"[{item}, {item.replace(':', '', 1)}, {item}, {item}]")
    assert reasons(read(flat)).count(None) >= 3
    assert [row.raw for row in read(flat)].count(item) == 3
    last = '{"c": [{"n": 1}, {"n": 2}]}'
    other_fields = write(tmp_path, "b.json", f'[{{"a": "x"}}, {{"b" [{{"n": 1}}, {{"n": 2}}]}}, {last}]')
    assert read(other_fields)[-1].raw == last


def test_a_bracket_too_many_swallows_no_items(tmp_path: Path) -> None:
    item = LINE.strip()
    assert reasons(read(write(tmp_path, "a.json", f"[{item}, [{item}, {item}], {item}]"))) == [None] * 4


def test_a_field_named_twice_is_rejected_and_not_lost(tmp_path: Path) -> None:
    twice = write(tmp_path, "a.jsonl", '{"prompt": "q", "completion": "a", "completion": "b"}\n' + LINE)
    rows = read(twice)
    assert reasons(rows) == ["duplicate_key", None]
    assert isinstance(rows[0].value, Rejection) and rows[0].value.detail == "completion"


def test_a_broken_first_item_does_not_hide_where_the_others_start(tmp_path: Path) -> None:
    item = json.dumps({"prompt": "q", "tags": [{"n": 1}, {"n": 2}]})
    cut = '{"prompt": "q", "tags": [{"n": 1'
    path = write(tmp_path, "a.json", f"[{item.replace(':', '', 1)}, {item}, {cut}, {item}, {item}]")
    assert [row.raw for row in read(path)].count(item) == 3


def test_a_broken_item_at_the_edge_of_what_is_in_memory_spoils_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.data.ingestion.json_records._READ_CHARS", 100)
    broken = '{"prompt" "' + "x" * 300 + '"}'
    path = write(tmp_path, "a.json", f"[{LINE.strip()}, {broken}, {LINE.strip()}, {LINE.strip()}]")
    assert reasons(read(path)) == [None, "unparsable", None, None]
    lines = write(tmp_path, "a.jsonl", f"{LINE}{broken}\n{LINE}{LINE}")
    assert reasons(read(lines)) == [None, "unparsable", None, None]


# --- whatever is in the files -------------------------------------------------------------------------------

RECORDS = [{"prompt": f"q{i}", "completion": "x é " * i, "tags": [{"n": i}, {"n": "]}"}]} for i in range(8)]
TEXTS = [json.dumps(record, ensure_ascii=i % 2 > 0) for i, record in enumerate(RECORDS)]
PRETTY = [json.dumps(record, ensure_ascii=i % 2 > 0, indent=2) for i, record in enumerate(RECORDS)]
WHOLE = {
    "lines.jsonl": "\n".join(TEXTS) + "\n",
    "pretty.jsonl": "\n".join(PRETTY) + "\n",
    "glued.json": "".join(PRETTY),
    "array.json": "[" + ",\n".join(TEXTS) + "]",
    "flat.json": json.dumps(RECORDS),
    "pretty.json": json.dumps(RECORDS, indent=1),
    "a.csv": "prompt,completion\n" + '"q, 1","a"\nq2,"b ""c"""\n' * 4,
    "b.csv": "prompt;completion\n" + '"q; 1","a, b"\nq2,3;"b ""c"""\n' * 4,
    "a.tsv": "prompt\tcompletion\n" + '"q\t1"\ta\nq2\t"b ""c"""\n' * 4,
}


def bare(text: str, punctuation: str) -> str:
    """What must not get lost: all but white space, marks, and what parts records."""
    return "".join(text.split()).translate(dict.fromkeys(map(ord, punctuation + "\ufeff")))


def untouched(name: str, text: str) -> list[str]:
    """The records of a JSON file that stand in it as they were written, between whole neighbours."""
    lines = "\n" + text + "\n"
    if name == "lines.jsonl":
        return [record for record in TEXTS if f"\n{record}\n" in lines]
    if name == "pretty.jsonl":
        return [record for record in PRETTY if f"\n{record}\n{{\n" in lines]
    if name == "array.json" and text.startswith("[{"):
        return [record for record in TEXTS if f",\n{record},\n{{" in text]
    if name == "flat.json" and text.startswith("[{"):
        return [record for record in map(json.dumps, RECORDS) if f", {record}, {{" in text]
    return []


def test_no_damage_to_a_file_loses_text_or_a_record_beside_it_or_ends_in_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TUNEGATE_FUZZ_CASES=20000 for a long run."""
    draw = random.Random(int(os.environ.get("TUNEGATE_FUZZ_SEED", "11")))
    whole = {name: text.encode() for name, text in WHOLE.items()}
    whole["a.jsonl.gz"] = gzip.compress(whole["lines.jsonl"])
    whole["a.jsonl.zst"] = pa.Codec("zstd").compress(whole["lines.jsonl"], asbytes=True)
    pq.write_table(pa.Table.from_pylist([GOOD] * 5), tmp_path / "good.parquet")
    whole["a.parquet"] = (tmp_path / "good.parquet").read_bytes()
    read_through = came_out = 0
    for case in range(int(os.environ.get("TUNEGATE_FUZZ_CASES", "1200"))):
        name = list(whole)[case % len(whole)]
        monkeypatch.setattr(
            "tasks.data.ingestion.json_records._READ_CHARS", draw.choice([300, 1 << 20])
        )  # records cut by the window
        path = Path(write(tmp_path / str(case), name, damage(whole[name], draw)))
        try:
            rows = read(str(path))
        except DataError:
            continue
        read_through += 1
        assert [row.line for row in rows] == sorted(row.line for row in rows)
        if path.suffix in (".gz", ".zst", ".parquet"):
            continue
        with open_text(path, resolve_encoding(path, "auto")[0]) as file:
            text = file.read()
        parted = ",[]" if text.lstrip("\ufeff \n").startswith("[") else ","
        taken = "".join(bare(row.raw, parted) for row in rows)
        everything = bare(printable(text), parted)
        # All that is missing is a table's header.
        assert everything.endswith(taken) if path.suffix in (".csv", ".tsv") else everything == taken, case
        good = {row.raw for row in rows if not isinstance(row.value, Rejection)}
        assert not set(untouched(name, text)) - good, case
        came_out += len(untouched(name, text))
    assert read_through > 200
    assert came_out > 100


WHOLE_FILE: dict[str, tuple[str, str | bytes, dict[str, Any], list[str]]] = {
    "empty": ("a.jsonl", "", {}, ["the file is empty"]),
    "only a header": ("a.csv", "prompt,completion\n", {}, ["no rows"]),
    "empty array": ("a.json", "[]", {}, ["no rows"]),
    "one object": ("a.json", '{\n"data": []\n}', {}, ["fields found: data"]),
    "no JSON": ("a.jsonl", "once upon a time\n", {}, ["one after the other or in one array"]),
    "wrong delimiter": (
        "a.csv",
        "prompt;completion\na;b\n",
        {"delimiter": ","},
        ["delimiter", "--set data.delimiter=';'"],
    ),
    "tabs in a csv": ("a.csv", "prompt\tcompletion\na\tb\n", {"delimiter": ","}, ["rename the file to .tsv"]),
    "semicolons in a tsv": ("a.tsv", "prompt;completion\na;b\n", {}, ["rename the file to .csv"]),
    "column twice": ("a.csv", "prompt,prompt\na,b\n", {}, ["named twice: prompt"]),
    "open quote": ("a.csv", 'prompt,completion\na,"b\nc,d\ne,f\n', {}, ["line 2", "never closed"]),
    "no parquet": ("a.parquet", "PAR", {}, ["Parquet"]),
    "unknown type": ("a.txt", "hi", {}, ["unknown file type .txt", ".jsonl"]),
    "gbk": (
        "a.csv",
        ("ask,answer\n" + "高血压患者能吃党参吗,可以口服党参的\n" * 20).encode("gbk"),
        {"encoding": "utf-8"},
        ["--set data.encoding=gb18030"],
    ),
    "utf-16": ("a.jsonl", LINE.encode("utf-16"), {"encoding": "utf-8"}, ["--set data.encoding=utf_16"]),
    "utf-16 without its mark": (
        "a.jsonl",
        LINE.encode("utf-16-le"),
        {"encoding": "utf-16"},
        ["hardly a line of it is utf-16", "data.encoding"],
    ),
    "unknown encoding": ("a.jsonl", LINE, {"encoding": "utf9"}, ["data.encoding", "utf9"]),
    "unknown columns": (
        "a.jsonl",
        LINE,
        {"columns": {"prompt": "q", "completion": "a"}},
        ["q is missing", "fields: prompt, completion"],
    ),
    "wrong mapping": ("a.jsonl", LINE, {"columns": {"prompt": "q"}}, ["completion is missing"]),
    "wrong format": ("a.jsonl", LINE, {"format": "alpaca"}, ["instruction is missing", "data.format"]),
}


@pytest.mark.parametrize("name", WHOLE_FILE)
def test_a_file_that_is_wrong_as_a_whole_stops_the_run_with_the_next_act(name: str, tmp_path: Path) -> None:
    file, content, data, parts = WHOLE_FILE[name]
    text = message(tmp_path, write(tmp_path, file, content), **data)
    for part in [*parts, *([] if data else [file])]:
        assert part in text


def test_all_problems_of_all_sources_are_said_together(tmp_path: Path) -> None:
    support = write(tmp_path, "support.jsonl", LINE)
    empty, semicolons = write(tmp_path, "empty.jsonl", ""), write(tmp_path, "semi.tsv", "a;b\n1;2\n")
    missing = str(tmp_path / "suport.jsonl")
    nothing = str(tmp_path / "*.parquet")
    text = message(tmp_path, support, empty, semicolons, missing, nothing, "builtin:docs")
    for part in ("is empty", "delimiter", "did you mean support.jsonl", "nothing matches", "builtin:python-docs"):
        assert part in text


def test_folders_and_globs_are_read_and_a_file_counts_once(tmp_path: Path) -> None:
    write(tmp_path, "data/a/rows.jsonl", LINE)
    write(tmp_path, "data/b/rows.jsonl", LINE)
    write(tmp_path, "data/b/notes.txt", "no data")
    write(tmp_path, "data/.hidden/rows.jsonl", LINE)
    spec = DataSpec(source=[str(tmp_path / "data"), str(tmp_path / "data/*/*.jsonl")])
    sources, problems = find_sources(spec)
    assert problems == []
    assert [source.name for source in sources] == ["a/rows.jsonl", "b/rows.jsonl"]


def test_the_snapshot_is_named_by_content_not_by_place_or_order(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    other = json.dumps({"prompt": "x", "completion": "y"}) + "\n"
    here = [write(tmp_path, "here/a.jsonl", LINE), write(tmp_path, "here/b.jsonl", other)]
    there = [write(tmp_path, "there/b.jsonl", other), write(tmp_path, "there/a.jsonl", LINE)]
    first = ingest_sources(store, DataSpec(source=here))
    assert ingest_sources(store, DataSpec(source=there)).id == first.id
    assert ingest_sources(store, DataSpec(source=here, system_prompt="Be brief.")).id != first.id
    assert (first.rows_in, first.unreadable, [file.rows for file in first.sources]) == (2, 0, [1, 1])


def test_a_source_digest_changes_with_the_file(tmp_path: Path) -> None:
    spec = DataSpec(source=[write(tmp_path, "a.jsonl", LINE), "builtin:python-docs", str(tmp_path / "missing.jsonl")])
    before = source_digests(spec)
    assert sorted(before) == ["builtin:python-docs", "file:a.jsonl"]
    write(tmp_path, "a.jsonl", LINE * 2)
    after = source_digests(spec)
    assert before["file:a.jsonl"] != after["file:a.jsonl"]
    assert before["builtin:python-docs"] == after["builtin:python-docs"]


def test_a_snapshot_keeps_rejected_rows_with_reason_and_raw_text(tmp_path: Path) -> None:
    store = Store(tmp_path)
    bad = '{"prompt": "hi", "completion": 5}'
    snapshot = ingest_sources(
        store, DataSpec(source=[write(tmp_path, "a.jsonl", LINE + bad + "\n" + '{"prompt": "\\ud800"}')])
    )
    rows = [row for part in snapshot.parts for row in pq.read_table(store.path(part)).to_pylist()]
    assert [(row["line"], row["reason"]) for row in rows] == [(1, None), (2, "wrong_type"), (3, "undecodable")]
    assert rows[1]["raw"] == bad
    assert rows[1]["messages"] is None
    assert snapshot.unreadable == 2
    assert len({row["row_id"] for row in rows}) == 3


def test_a_hub_data_set_without_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("OfflineModeIsEnabled")

    def unknown(*_: object, **__: object) -> None:
        raise datasets.exceptions.DatasetNotFoundError("no such repository")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(InfrastructureError, match="HF_HUB_OFFLINE"):
        ingest_sources(Store(tmp_path), DataSpec(source=["hub:org/name"]))
    monkeypatch.setattr(datasets, "load_dataset", unknown)
    with pytest.raises(DataError, match="check ORG/NAME"):
        ingest_sources(Store(tmp_path), DataSpec(source=["hub:org/name"]))


def test_a_hub_data_set_is_read_like_a_file_at_the_revision_asked_for(tmp_path: Path, monkeypatch) -> None:
    import datasets

    asked: list[tuple[str, str | None]] = []

    def load(name: str, revision: str | None, **_: object) -> datasets.Dataset:
        asked.append((name, revision))
        return datasets.Dataset.from_list([GOOD, GOOD])

    monkeypatch.setattr(datasets, "load_dataset", load)
    snapshot = ingest_sources(Store(tmp_path), DataSpec(source=["hub:org/name"]))
    assert (snapshot.rows_in, snapshot.sources[0].name) == (2, "org/name")
    ingest_sources(Store(tmp_path), DataSpec(source=["hub:org/name@v1"]))
    assert set(asked) == {("org/name", None), ("org/name", "v1")}
