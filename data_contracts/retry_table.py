"""What an error of another library means: is it transient, what is it called, what is the next act. One table, `KINDS`.

The retry condition of the stages, the workers' harness and the command read it. Errors are recognised by their names, numbers
and texts, along `__cause__` and `__context__`, so nothing is imported for it. docs/failures.md shows it.
"""

import errno
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from data_contracts.errors import (
    ConfigError,
    InfrastructureError,
    InputError,
    Problem,
    StoreError,
    TransientError,
    TunegateError,
    error_chain,
)
from data_contracts.redaction import without_secrets

_TEXT_CHARS: Final = 200
Test = Callable[[BaseException], bool]


@dataclass(frozen=True)
class FailureKind:
    """One row: what it is called, whether it is retried, which of our errors it becomes, how it is recognised (as a test and
    in words), and the next act."""

    name: str
    retried: bool
    error: type[TunegateError]
    test: Test
    seen: str
    act: str


def is_a(*names: str) -> Test:
    """Whether a class of the error is called so: `name`, or `package.name` for a name that many packages use."""
    wanted = set(names)

    def test(error: BaseException) -> bool:
        found = {(cls.__module__.partition(".")[0], cls.__name__) for cls in type(error).__mro__}
        return any(name in wanted or f"{package}.{name}" in wanted for package, name in found)

    return test


def http_status(*codes: int) -> Test:
    """Whether a server answered with one of these HTTP statuses."""
    return lambda error: _status(error) in codes


def os_error(*numbers: int) -> Test:
    """Whether the operating system refused with one of these numbers."""
    return lambda error: isinstance(error, OSError) and error.errno in numbers


def text(pattern: str, of: Test = lambda _: True) -> Test:
    """Whether an error (of such a class) says this."""
    compiled = re.compile(pattern, re.IGNORECASE)
    return lambda error: of(error) and bool(compiled.search(str(error)))


def either(*tests: Test) -> Test:
    return lambda error: any(test(error) for test in tests)


def _status(error: BaseException) -> int | None:
    candidates = [getattr(getattr(error, "response", None), "status_code", None)]
    candidates += [getattr(error, name, None) for name in ("status_code", "code")]
    method = getattr(error, "get_http_status_code", None)  # MLflow's: 500 for an error that it has no code for
    candidates += [found for found in [method() if callable(method) else None] if found != 500]
    return next((found for found in candidates if isinstance(found, int) and 400 <= found <= 599), None)


_DATABASE: Final = is_a("OperationalError", "InterfaceError", "DatabaseError", "SQLAlchemyError")
_GONE: Final = (
    "connection refused|could not connect|can't connect|connection reset|server closed the connection|"
    "terminating connection|database system is (starting up|shutting down)|too many (clients|connections)|"
    "remaining connection slots|lost connection|server has gone away|connection timed out|timeout expired"
)


def _is_disconnected(error: BaseException) -> bool:
    return _DATABASE(error) and (getattr(error, "connection_invalidated", False) or text(_GONE)(error))


def _is_network(error: BaseException) -> bool:
    # A broken pipe of our own stdout is no network; within a request, urllib3 and httpx wrap it.
    return not isinstance(error, BrokenPipeError) and is_a(
        "builtins.ConnectionError", "builtins.TimeoutError", "socket.gaierror", "urllib.URLError",
        "requests.ConnectionError", "requests.Timeout", "requests.RetryError", "requests.ChunkedEncodingError",
        "urllib3.TimeoutError", "urllib3.ProtocolError", "urllib3.MaxRetryError",
        *(f"{name}.{kind}" for name in ("httpx", "httpx2", "httpcore", "httpcore2")
          for kind in ("NetworkError", "TimeoutException", "RemoteProtocolError", "ProxyError")),
        "aiohttp.ClientConnectionError",
    )(error)  # fmt: skip


RETRY: Final = True
STOP: Final = False
_ROOM: Final = either(
    os_error(errno.ENOSPC, errno.EDQUOT),
    text("disk is full|no space left on device|disk quota exceeded", _DATABASE),
    text(
        rf"\[Errno ({errno.ENOSPC}|{errno.EDQUOT})\]|\(os error ({errno.ENOSPC}|{errno.EDQUOT})\)"
    ),  # shutil's, Rust's
)
_MEMORY: Final = either(
    is_a("MemoryError", "torch.OutOfMemoryError"),
    os_error(errno.ENOMEM),
    text("can't allocate memory", is_a("RuntimeError")),
)
_LOGIN: Final = either(
    http_status(401, 403, 407),
    text("password authentication failed|no password supplied|access denied for user", _DATABASE),
)
_PERMISSION: Final = either(is_a("PermissionError"), os_error(errno.EROFS), text("readonly database", _DATABASE))

# From the most to the least certain: the first row that fits anything in an error's chain counts.
KINDS: Final = (
    FailureKind("our own, transient", RETRY, TransientError, is_a("data_contracts.TransientError"),
         "`TransientError`: a worker killed by a signal (it resumes from its checkpoint), busy, or without the hub",
         "as it says"),
    FailureKind("our own, input", STOP, InputError, is_a("data_contracts.InputError"),
         "`ConfigError`, `DataError`: a setting, rows, the contract; a loss that is NaN or climbs; memory too small for one row",
         "as it says"),
    FailureKind("our own, other", STOP, InfrastructureError, is_a("data_contracts.TunegateError"),
         "`GateError`, `StoreError`, `WorkerError`: a gate said no, the disk, a worker that ended badly",
         "as it says"),
    FailureKind("offline on purpose", STOP, ConfigError, is_a("OfflineModeIsEnabled"),
         "`OfflineModeIsEnabled` of huggingface_hub",
         "go online (unset HF_HUB_OFFLINE), or give a folder or file of this machine"),
    FailureKind("the time for this stage is over", STOP, InfrastructureError, is_a("TaskRunTimeoutError", "FlowRunTimeoutError"),
         "`TaskRunTimeoutError`, `FlowRunTimeoutError` of Prefect",
         "the same command resumes from there; the limit is in tasks/pipeline/policies.py"),
    FailureKind("the disk is full", STOP, StoreError, _ROOM,
         "ENOSPC, EDQUOT, or their text in another error; a database that says so",
         "make room, or move the store with --set store.root=DIR; the same command then resumes"),
    FailureKind("out of memory", STOP, ConfigError, _MEMORY,
         "`MemoryError`, `torch.OutOfMemoryError`, ENOMEM; training first computes its step in 2, 4, ... parts",
         "lower train.batch_tokens, train.max_tokens or evaluate.batch_tokens, or free some memory"),
    FailureKind("its certificate is not trusted", STOP, ConfigError,
         either(is_a("SSLCertVerificationError"), text("CERTIFICATE_VERIFY_FAILED")),
         "`SSLCertVerificationError`, or its text in another error",
         "name your authority's file in SSL_CERT_FILE and REQUESTS_CA_BUNDLE"),
    FailureKind("not logged in", STOP, ConfigError, _LOGIN,
         "HTTP 401, 403, 407; a database that refuses a password",
         "check the login that this server wants"),  # or one of _LOGINS
    FailureKind("not there", STOP, ConfigError, http_status(404, 410),
         "HTTP 404, 410",
         "check the name and the address"),
    FailureKind("not permitted", STOP, StoreError, _PERMISSION,
         "`PermissionError`, EROFS; a database that may only be read",
         "give a place you may write to: --set store.root=DIR"),
    FailureKind("held by another program", RETRY, TransientError,
         either(text("database (table |schema )?is (locked|busy)"), is_a("filelock.Timeout")),
         "sqlite: database is locked or busy; `Timeout` of filelock",
         "end the program that holds it; the same command then resumes"),
    FailureKind("the database is away", RETRY, TransientError, _is_disconnected,
         "`OperationalError`, `InterfaceError`: refused, closed, restarting, too many connections",
         "start it; the same command then resumes"),
    FailureKind("the database failed", STOP, StoreError, _DATABASE,
         "any other error of sqlite3, SQLAlchemy or a driver",
         "read what it says; after an upgrade of MLflow: mlflow db upgrade URI"),
    FailureKind("the server is busy or failing", RETRY, TransientError, http_status(408, 425, 429, *range(500, 600)),
         "HTTP 408, 425, 429, 5xx",
         "wait until the server is well; the same command then resumes"),
    FailureKind("the network failed", RETRY, TransientError, _is_network,
         "refused or broken connections, time-outs, unknown hosts: Python, requests, urllib3, httpx, aiohttp",
         "check the address and the connection; the same command then resumes"),
)  # fmt: skip

_LOGINS: Final = {
    "huggingface_hub": "log in with `hf auth login` or set HF_TOKEN, and check the name: the hub says the same of one that is not there",
    "mlflow": "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
    "prefect": "set PREFECT_API_KEY or PREFECT_API_AUTH_STRING",
}


def kind_of(error: BaseException) -> FailureKind | None:
    """The row of the table; None for what it does not know: a bug, which is not retried."""
    chain = list(error_chain(error))
    return next((kind for kind in KINDS if any(kind.test(link) for link in chain)), None)


def is_transient(error: BaseException) -> bool:
    """Whether a retry makes sense."""
    kind = kind_of(error)
    return kind is not None and kind.retried


def explained(error: BaseException, place: Path | None = None) -> TunegateError | None:
    """The error as one of ours, with what to do next; ours as it is; None for a bug. `place`: the store's root.

    Raise it `from None` if `has_secret(error)`, else `from error`.
    """
    chain = list(error_chain(error))
    own = next((link for link in chain if isinstance(link, TunegateError)), None)
    kind = kind_of(error)
    if own or kind is None:
        return own
    act = kind.act
    if kind.name == "not logged in":
        packages = [type(link).__module__.partition(".")[0] for link in chain]
        act = next((login for name, login in _LOGINS.items() if name in packages), act)
    where = next((found for found in map(_where, chain) if found), "") or str(place or "")
    limit = _room(Path(where)) if kind.name == "the disk is full" and where else ""
    return kind.error(Problem(f"{kind.name}: {_line(error)}", where, limit, act))


def _where(error: BaseException) -> str:
    """The server or file that an error speaks of."""
    if isinstance(error, OSError) and isinstance(error.filename, str):
        return error.filename
    for holder in (getattr(error, "response", None), _request(error)):
        url = urlsplit(str(getattr(holder, "url", None) or ""))
        if url.netloc:
            return f"{url.scheme}://{url.netloc.rpartition('@')[2]}"
    return ""


def _request(error: BaseException) -> Any:
    try:
        return getattr(error, "request", None)
    except RuntimeError:  # httpx: none was set
        return None


def _room(path: Path) -> str:
    there = next((folder for folder in (path, *path.absolute().parents) if folder.is_dir()), None)
    return f"{shutil.disk_usage(there).free / 1e6:.1f} MB free there, less than is needed" if there else ""


def _line(error: BaseException) -> str:
    lines = without_secrets(str(error)).strip().splitlines()
    first = lines[0].strip() if lines else ""
    return (first[: _TEXT_CHARS - 3] + "...") if len(first) > _TEXT_CHARS else first or type(error).__name__
