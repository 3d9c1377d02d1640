"""Each kind of error is recognised wherever it hides, and reported with its next act and without secrets.

Run: pytest tests/contracts/test_retry_table.py
"""

import errno
import shutil
import sqlite3
import ssl
from pathlib import Path

import httpx
import httpx2
import pytest
import requests
import sqlalchemy
import torch
import urllib3
from filelock import Timeout
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED, RESOURCE_DOES_NOT_EXIST, TEMPORARILY_UNAVAILABLE
from prefect.exceptions import PrefectHTTPStatusError
from prefect.task_engine import TaskRunTimeoutError

from data_contracts.errors import ConfigError, DataError, GateError, Problem, StoreError, TransientError, WorkerError
from data_contracts.redaction import has_secret, without_secrets
from data_contracts.retry_table import KINDS, explained, is_transient, kind_of

TABLE = Path(__file__).parents[2] / "docs" / "failures.md"
PROBLEM = Problem("something")


def after(error: Exception, cause: Exception, how: str = "cause") -> Exception:
    """The error as it is when another one led to it: raised from it, or while it was handled."""
    try:
        try:
            raise cause
        except Exception as first:
            if how == "cause":
                raise error from first
            if how == "hidden":
                raise error from None
            raise error  # noqa: B904 what MLflow does
    except type(error) as raised:
        return raised


def of_requests(code: int) -> Exception:
    response = requests.Response()
    response.status_code, response.url = code, "http://user:geheim@models.example:5000/api?token=geheim"
    return requests.HTTPError(f"{code} Error for url: {response.url}", response=response)


def of_hub(code: int, kind: type[HfHubHTTPError] = HfHubHTTPError) -> Exception:
    request = httpx2.Request("GET", "https://huggingface.co/api/models/a/b")
    return kind(f"{code} Client Error", response=httpx2.Response(code, request=request))


def of_prefect(code: int) -> Exception:
    request = httpx.Request("GET", "http://127.0.0.1:4200/api/flows")
    error = httpx.HTTPStatusError("Server error", request=request, response=httpx.Response(code, request=request))
    return PrefectHTTPStatusError.from_httpx_error(error)


def of_sqlalchemy(text: str) -> Exception:
    return sqlalchemy.exc.OperationalError("SELECT 1", {}, sqlite3.OperationalError(text))


def of_mlflow_database(text: str) -> Exception:
    """MLflow calls every error of its database temporary."""
    error = of_sqlalchemy(text)
    return after(MlflowException(str(error), error_code=TEMPORARILY_UNAVAILABLE), error)


EXAMPLES = {
    "our own, transient": [TransientError(PROBLEM)],
    "our own, input": [ConfigError(PROBLEM), DataError(PROBLEM)],
    "our own, other": [GateError(PROBLEM), WorkerError(PROBLEM), after(StoreError(PROBLEM), ConnectionError())],
    "offline on purpose": [
        OfflineModeIsEnabled("offline"),
        after(LocalEntryNotFoundError("not cached"), OfflineModeIsEnabled("offline")),
    ],
    "the time for this stage is over": [TaskRunTimeoutError("3 s")],
    "the disk is full": [
        OSError(errno.ENOSPC, "No space left on device"),
        shutil.Error([("a", "b", "[Errno 28] No space left on device: 'a' -> 'b'")]),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError(errno.EDQUOT, "Quota exceeded"),
        of_mlflow_database("database or disk is full"),
    ],
    "out of memory": [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
    "its certificate is not trusted": [
        ssl.SSLCertVerificationError("self-signed"),
        requests.exceptions.SSLError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed"),
    ],
    "not logged in": [
        of_requests(401), of_hub(403), of_hub(403, GatedRepoError), of_prefect(401),
        MlflowException("no", error_code=PERMISSION_DENIED), of_sqlalchemy('password authentication failed for user "x"'),
    ],
    "not there": [of_requests(404), of_hub(404), MlflowException("no", error_code=RESOURCE_DOES_NOT_EXIST)],
    "not permitted": [
        PermissionError(errno.EACCES, "Permission denied", "/somewhere"),
        OSError(errno.EROFS, "Read-only file system"),
        sqlite3.OperationalError("attempt to write a readonly database"),
    ],
    "held by another program": [
        sqlite3.OperationalError("database is locked"),
        of_mlflow_database("database is locked"),
        sqlite3.OperationalError("database table is locked: runs"),
        Timeout("mlflow.lock"),
    ],
    "the database is away": [
        of_sqlalchemy("connection to server at 127.0.0.1, port 5432 failed: Connection refused"),
        of_sqlalchemy("server closed the connection unexpectedly"),
        of_sqlalchemy("FATAL: the database system is starting up"),
        sqlalchemy.exc.DBAPIError("SELECT 1", {}, Exception("lost"), connection_invalidated=True),
    ],
    "the database failed": [sqlite3.OperationalError("no such table: runs"), of_mlflow_database("no such column: x")],
    "the server is busy or failing": [
        *(of_requests(code) for code in (408, 425, 429, 500, 502, 503, 504)),
        of_hub(503), of_prefect(503), MlflowException("busy", error_code=TEMPORARILY_UNAVAILABLE),
    ],
    "the network failed": [
        ConnectionRefusedError("refused"), TimeoutError("timed out"), requests.ConnectionError(), requests.ReadTimeout(),
        urllib3.exceptions.ProtocolError("broken"), httpx.ConnectError("refused"), httpx2.ReadTimeout("late"),
        after(MlflowException("API request failed"), requests.exceptions.RetryError("too many 503"), "context"),
        after(LocalEntryNotFoundError("not cached"), httpx2.ConnectError("refused")),
    ],
}  # fmt: skip


def test_every_kind_has_an_example_and_no_other():
    assert EXAMPLES.keys() == {kind.name for kind in KINDS}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_error_is_recognised_by_its_kind_and_becomes_ours(name):
    kind = next(kind for kind in KINDS if kind.name == name)
    for error in EXAMPLES[name]:
        assert kind_of(error) is kind, repr(error)
        assert is_transient(error) is kind.retried
        reported = explained(error)
        if kind.name.startswith("our own"):
            assert reported is error
            continue
        assert type(reported) is kind.error
        assert is_transient(reported) is kind.retried, "what is reported and what is retried must agree"
        assert reported.problems[0].what.startswith(name)
        assert reported.problems[0].act


@pytest.mark.parametrize(
    "bug",
    [
        ValueError("a bug"),
        KeyError("x"),
        BrokenPipeError("nobody reads our output"),
        after(ValueError("a bug"), ConnectionError("handled, and no part of it"), "hidden"),
        MlflowException("a bug of MLflow's is called 500"),
        of_requests(400),
    ],
)
def test_a_bug_is_not_tried_again_and_stays_what_it_is(bug):
    assert kind_of(bug) is None
    assert not is_transient(bug)
    assert explained(bug) is None


def test_the_chain_of_an_error_may_be_a_circle():
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert kind_of(first) is None


@pytest.mark.parametrize(
    ("error", "act"),
    [
        (of_hub(401), "hf auth login"),
        (MlflowException("no", error_code=PERMISSION_DENIED), "MLFLOW_TRACKING_USERNAME"),
        (of_prefect(403), "PREFECT_API_KEY"),
        (of_requests(401), "check the login"),
    ],
)
def test_an_error_of_a_missing_login_says_which_login_to_set(error, act):
    assert act in explained(error).problems[0].act


def test_a_full_disk_says_where_and_how_much_is_free(tmp_path):
    named = explained(OSError(errno.ENOSPC, "No space left", str(tmp_path / "not" / "there")), Path("/"))
    assert named.problems[0].where == str(tmp_path / "not" / "there")
    assert "MB free there" in named.problems[0].limit
    unnamed = explained(OSError(errno.ENOSPC, "No space left"), tmp_path)
    assert unnamed.problems[0].where == str(tmp_path)


def test_an_error_names_its_server_but_never_a_secret():
    error = of_requests(401)
    (problem,) = explained(error).problems
    assert problem.where == "http://models.example:5000"
    assert "geheim" not in str(problem)
    assert has_secret(error)
    assert not has_secret(of_hub(401))


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("postgresql://me:geheim@db/x failed", "postgresql://db/x failed"),
        ("GET https://a/b?sig=geheim failed", "GET https://a/b failed"),
        ("header: Bearer geheimgeheim", "header: Bearer ..."),
        ("token hf_geheimgeheim is bad", "token hf_... is bad"),
        ("password=geheim, user=me", "password=..., user=me"),
        ("did you mean a? 512 tokens: yes", "did you mean a? 512 tokens: yes"),
    ],
)
def test_what_looks_like_a_login_is_left_out(text, kept):
    assert without_secrets(text) == kept


def test_the_documentation_shows_the_table_as_it_is():
    page = TABLE.read_text(encoding="utf-8")
    table = page.partition("| kind | recognised by | then | next act |\n|---|---|---|---|\n")[2].partition("\n\n")[0]
    rows = [f"| {k.name} | {k.seen} | {'retried' if k.retried else 'stop'} | {k.act} |" for k in KINDS]
    assert table.splitlines() == rows
