"""Sources at URLs: a real web server, a real S3 server (moto) and fsspec's memory, all on this machine.

    pytest tests/data/test_urls.py

Never run: gs, az, sftp, ftp, smb and hdfs. They are read by the same code, through fsspec's own libraries.
"""

import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import Request, urlopen

import fsspec
import pytest
from pydantic import ValidationError

from data_contracts.data_spec import DataSpec
from data_contracts.errors import DataError, TransientError
from flows.config.init_spec import write_preset
from flows.config.load import load_spec
from tasks.data.ingestion import urls
from tasks.data.ingestion.ingest import ingest_sources
from tasks.data.ingestion.sources import find_sources, local_copies, source_digests
from tasks.runtime.store import Store


def lines(*numbers: int) -> str:
    return "".join(json.dumps({"prompt": f"What is {n}?", "completion": f"It is {n}."}) + "\n" for n in numbers)


def downloads(store: Store) -> list[str]:
    return sorted(file.name for file in (store.files / "downloads").glob("*/*"))


def problems(*entries: str) -> str:
    return "\n".join(map(str, find_sources(DataSpec(source=list(entries)))[1]))


# --- a web server -------------------------------------------------------------------------------------------


class Handler(SimpleHTTPRequestHandler):
    """Counts how often a file's bytes were sent."""

    def do_GET(self) -> None:
        self.server.sent.append(self.path)
        super().do_GET()

    def send_head(self):
        if self.path.startswith("/private"):
            self.send_error(403)
            return None
        if self.path.startswith("/broken"):
            self.send_error(503)
            return None
        return super().send_head()

    def send_header(self, keyword: str, value: str) -> None:
        if not (keyword == "Last-Modified" and self.path.startswith("/undated")):
            super().send_header(keyword, value)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """(address, folder it serves, paths whose bytes were asked for)"""
    folder = tmp_path / "web"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        server.sent = []
        thread = threading.Thread(target=server.serve_forever, args=[0.02])
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", folder, server.sent
        server.shutdown()
        thread.join()


def test_a_file_on_the_web_is_looked_at_without_its_bytes_and_fetched_once(web, tmp_path):
    address, folder, sent = web
    (folder / "rows.jsonl").write_text(lines(1, 2))
    store, data = Store(tmp_path / "store"), DataSpec(source=[f"{address}/rows.jsonl"])
    before = source_digests(data)
    assert sent == []
    found = ingest_sources(store, data)
    assert (found.rows_in, [file.name for file in found.sources]) == (2, ["rows.jsonl"])
    assert ingest_sources(store, data) == found
    assert sent == ["/rows.jsonl"]
    assert source_digests(data) == before
    assert list(before) == ["url:rows.jsonl"]


def test_new_content_at_the_same_address_is_seen_and_the_old_copy_stays_what_it_was(web, tmp_path):
    address, folder, _ = web
    store, data = Store(tmp_path / "store"), DataSpec(source=[f"{address}/rows.jsonl"])
    (folder / "rows.jsonl").write_text(lines(1))
    first, before = ingest_sources(store, data), source_digests(data)
    (folder / "rows.jsonl").write_text(lines(1, 2))
    assert source_digests(data) != before
    second = ingest_sources(store, data)
    assert (first.rows_in, second.rows_in) == (1, 2)
    assert downloads(store) == ["rows.jsonl", "rows.jsonl"]


def test_the_same_rows_are_the_same_snapshot_wherever_they_lie(web, tmp_path):
    address, folder, _ = web
    (folder / "rows.jsonl").write_text(lines(1, 2, 3))
    store = Store(tmp_path / "store")
    local = ingest_sources(store, DataSpec(source=[str(folder / "rows.jsonl")]))
    assert ingest_sources(store, DataSpec(source=[f"{address}/rows.jsonl?v=3"])).id == local.id
    assert ingest_sources(store, DataSpec(source=[f"file://{folder}/rows.jsonl"])).id == local.id


def test_a_pattern_is_matched_against_the_links_of_a_web_page(web, tmp_path):
    address, folder, _ = web
    for name in ("a.jsonl", "b.jsonl", "c.txt"):
        (folder / name).write_text(lines(1))
    found, wrong = find_sources(DataSpec(source=[f"{address}/*.jsonl"]))
    assert ([source.name for source in found], wrong) == (["a.jsonl", "b.jsonl"], [])


def test_init_writes_a_preset_for_rows_on_the_web(web, tmp_path, monkeypatch):
    address, folder, _ = web
    (folder / "rows.jsonl").write_text(lines(*range(60)))
    monkeypatch.chdir(tmp_path)
    look = write_preset(Path("my.yaml"), f"{address}/rows.jsonl", None, None, [])
    assert look.sample.counts == {"rows.jsonl": 60}
    assert load_spec("my.yaml", []).spec.data.source == [f"{address}/rows.jsonl"]


def test_everything_that_is_wrong_with_addresses_is_said_at_once_with_the_next_act(web):
    address, folder, _ = web
    for name in ("private.jsonl", "undated.jsonl"):
        (folder / name).write_text(lines(1))
    wrong = ["missing.jsonl", "private.jsonl", "undated.jsonl"]
    chain = "simplecache::https://example.invalid/rows.jsonl"
    text = problems(*(f"{address}/{name}" for name in wrong), chain, "reference://x.json", "gs://bucket/rows.jsonl")
    for part in (
        "no such file or folder", "access is refused", "environment", "neither a hash nor a time", "a chain of URLs",
        "reference:// is not read", "pip install 'gcsfs'",
    ):  # fmt: skip
        assert part in text


def test_a_server_that_fails_or_cannot_be_reached_is_a_transient_error(web):
    address, _, _ = web
    for entry in (f"{address}/broken.jsonl", "http://127.0.0.1:9/rows.jsonl"):
        with pytest.raises(TransientError, match="retry"):
            find_sources(DataSpec(source=[entry]))


def test_a_file_that_changes_while_it_is_read_is_not_kept(web, tmp_path):
    address, folder, _ = web
    (folder / "rows.jsonl").write_text(lines(1))
    found, _ = find_sources(DataSpec(source=[f"{address}/rows.jsonl"]))
    (folder / "rows.jsonl").write_text(lines(1, 2))
    store = Store(tmp_path / "store")
    with pytest.raises(TransientError, match="changed while it was read"):
        local_copies(store, found)
    assert downloads(store) == []


# --- S3 -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    pytest.importorskip("s3fs", reason="tunegate[s3] is not installed")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    """An empty bucket `support`, and where it is and how to enter it in the environment."""
    urlopen(Request(f"{s3_server}/moto-api/reset", method="POST")).close()
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-of-the-test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    fs.mkdir("support")
    yield fs
    # It would keep the credentials for the next test.
    fs.clear_instance_cache()


def test_a_folder_and_a_pattern_in_a_bucket_are_read_and_a_file_counts_once(s3, tmp_path):
    s3.pipe({"support/2026/a/rows.jsonl": lines(1).encode(), "support/2026/b/rows.jsonl": lines(2, 3).encode()})
    s3.pipe({"support/2026/.draft/rows.jsonl": b"not yet", "support/2026/notes.txt": b"no data"})
    data = DataSpec(source=["s3://support/2026", "s3://support/2026/*/rows.jsonl"])
    before = source_digests(data)
    assert list(before) == ["url:a/rows.jsonl", "url:b/rows.jsonl"]
    found = ingest_sources(Store(tmp_path), data)
    assert found.rows_in == 3
    s3.pipe("support/2026/b/rows.jsonl", lines(2, 3, 4).encode())
    after = source_digests(data)
    assert [before[name] == after[name] for name in before] == [True, False]


def test_no_credential_reaches_a_name_a_version_or_the_store(s3, tmp_path):
    s3.pipe("support/rows.jsonl", lines(1).encode())
    data = DataSpec(source=["s3://support/rows.jsonl"])
    shown = (
        f"{find_sources(data)} {ingest_sources(Store(tmp_path), data)} {[str(path) for path in tmp_path.rglob('*')]}"
    )
    assert "of-the-test" not in shown


def test_a_bucket_that_is_not_there_is_said(s3):
    assert "no such file or folder" in problems("s3://missing/rows.jsonl")
    assert "nothing is there" in problems("s3://support/*.jsonl")


def test_s3_without_credentials_says_where_they_come_from(s3, monkeypatch, tmp_path):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    assert "access is refused" in problems("s3://support/rows.jsonl")


# --- names and secrets --------------------------------------------------------------------------------------


def test_rows_in_memory_are_read_like_any_other(tmp_path):
    fsspec.filesystem("memory").pipe("/box/rows.jsonl", lines(1, 2).encode())
    assert ingest_sources(Store(tmp_path), DataSpec(source=["memory://box"])).rows_in == 2


@pytest.mark.parametrize(
    "entry",
    [
        "https://joe:hunter2@example.invalid/rows.jsonl",
        "https://example.invalid/rows.jsonl?X-Amz-Signature=hunter2",
        "https://example.invalid/rows.jsonl?v=1&access_token=hunter2",
    ],
)
def test_a_source_with_a_secret_in_it_is_refused_before_anything_can_show_it(entry):
    with pytest.raises(ValidationError, match="put it in the environment"):
        DataSpec(source=[entry])


@pytest.mark.parametrize("entry", ["sftp://joe@example.invalid/rows.jsonl", "https://example.invalid/rows.jsonl?v=1"])
def test_a_user_and_a_plain_query_are_no_secrets(entry):
    assert DataSpec(source=[entry]).source == [entry]


@pytest.mark.parametrize(
    ("entry", "path", "place"),
    [
        ("s3://Bucket/a/*.csv", "Bucket/a/b.csv", "Bucket/a/b.csv"),
        ("sftp://joe@host/data/x.csv", "/data/x.csv", "host/data/x.csv"),
        ("https://host/x.csv?v=1", "https://host/x.csv?v=1", "host/x.csv"),
        ("memory://box/x.csv", "/box/x.csv", "box/x.csv"),
    ],
)
def test_a_place_names_host_or_bucket_and_folders_without_user_and_query(entry, path, place):
    assert urls._found(entry, path, {"mtime": 3}).place == place


def test_a_hash_says_more_of_the_content_than_a_time():
    assert urls._version({"ETag": '"a"', "LastModified": 3, "size": 5}) == "etag=a size=5"
    assert urls._version({"last_modified": 3, "created": 2, "size": 5}) == "lastmodified=3 size=5"
    assert urls._version({"size": 5}) is None


def test_problems_of_addresses_and_of_files_come_together(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError) as raised:
        ingest_sources(Store(tmp_path / "store"), DataSpec(source=["python://x", str(tmp_path / "empty.jsonl")]))
    assert "is not read" in str(raised.value)
    assert "is empty" in str(raised.value)
