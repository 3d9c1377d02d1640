"""Every record of every file type comes out once; what is wrong with whole files is said all at once."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_contracts.errors import DataError, InfrastructureError
from data_contracts.rules import Rejection
from data_contracts.run_spec import DataSpec
from tasks.ingest import ingest
from tasks.readers import RawRow, read_source
from tasks.sources import Source, find_sources, source_digests
from tasks.stores import Store

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
        ingest(Store(tmp_path / "store"), DataSpec(source=list(sources), **data))
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


WHOLE_FILE: dict[str, tuple[str, str | bytes, dict[str, Any], list[str]]] = {
    "empty": ("a.jsonl", "", {}, ["the file is empty"]),
    "only a header": ("a.csv", "prompt,completion\n", {}, ["no rows"]),
    "empty array": ("a.json", "[]", {}, ["no rows"]),
    "broken array": ("a.json", '[{"prompt": "a"},\n {"prompt" 1}]', {}, ["line 2, column 12", "not valid JSON"]),
    "one object": ("a.json", '{\n"data": []\n}', {}, ["one array of objects"]),
    "array named jsonl": ("a.jsonl", f"[{LINE.strip()}]", {}, ["named .json"]),
    "wrong delimiter": ("a.csv", "prompt;completion\na;b\n", {}, ["delimiter", "--set data.delimiter=';'"]),
    "tabs in a csv": ("a.csv", "prompt\tcompletion\na\tb\n", {}, ["rename the file to .tsv"]),
    "column twice": ("a.csv", "prompt,prompt\na,b\n", {}, ["named twice: prompt"]),
    "open quote": ("a.csv", 'prompt,completion\na,"b\nc,d\ne,f\n', {}, ["line 2", "never closed"]),
    "no parquet": ("a.parquet", "PAR", {}, ["Parquet"]),
    "unknown type": ("a.txt", "hi", {}, ["unknown file type .txt", ".jsonl"]),
    "gbk": (
        "a.csv",
        ("ask,answer\n" + "高血压患者能吃党参吗,可以口服党参的\n" * 20).encode("gbk"),
        {},
        ["--set data.encoding=gb18030"],
    ),
    "utf-16": ("a.jsonl", LINE.encode("utf-16"), {}, ["--set data.encoding=utf_16"]),
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
    empty, semicolons = write(tmp_path, "empty.jsonl", ""), write(tmp_path, "semi.csv", "a;b\n1;2\n")
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
    first = ingest(store, DataSpec(source=here))
    assert ingest(store, DataSpec(source=there)).id == first.id
    assert ingest(store, DataSpec(source=here, system_prompt="Be brief.")).id != first.id
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
    snapshot = ingest(store, DataSpec(source=[write(tmp_path, "a.jsonl", LINE + bad + "\n" + '{"prompt": "\\ud800"}')]))
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
        ingest(Store(tmp_path), DataSpec(source=["hub:org/name"]))
    monkeypatch.setattr(datasets, "load_dataset", unknown)
    with pytest.raises(DataError, match="check ORG/NAME"):
        ingest(Store(tmp_path), DataSpec(source=["hub:org/name"]))


def test_a_hub_data_set_is_read_like_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list([GOOD, GOOD]))
    snapshot = ingest(Store(tmp_path), DataSpec(source=["hub:org/name"]))
    assert (snapshot.rows_in, snapshot.sources[0].name) == (2, "org/name")
