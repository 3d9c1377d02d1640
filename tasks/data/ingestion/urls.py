"""Files at a URL: found without a download, and identified by what their store reports of their content.

Credentials come from the environment, as each store's own library reads them; a URL that holds a secret is refused with
the spec. Only plain files of remote stores are read: fsspec's other schemes run code or reach into other URLs.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from glob import has_magic
from pathlib import PurePosixPath
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from data_contracts.errors import ConfigError, Problem, TransientError, TunegateError

# Scheme -> the package that fsspec reads it with, where it is not installed anyway.
SCHEMES: Final = {
    "http": "", "https": "", "s3": "tunegate[s3]", "s3a": "tunegate[s3]", "gs": "gcsfs", "gcs": "gcsfs",
    "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs", "oss": "ossfs", "oci": "ocifs", "sftp": "paramiko",
    "ssh": "paramiko", "ftp": "", "smb": "smbprotocol", "hdfs": "", "webhdfs": "", "memory": "",
}  # fmt: skip
_READABLE: Final = "s3, gs, az, http, https, sftp, ftp, smb, hdfs and their other names"
# What a store says of a file's content, best first: a hash of it, else when it was written. Names without - and _.
_HASHES: Final = ("etag", "md5hash", "contentmd5", "digest")
_TIMES: Final = ("lastmodified", "updated", "mtime", "modify", "modified", "created")
_NO_ACCESS: Final = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError")  # botocore's


class RemoteFile(NamedTuple):
    """One file of a remote store."""

    path: str  # as its file system names it
    place: str  # host or bucket and folders, without user and query
    version: str
    size: int | None


def is_url(entry: str) -> bool:
    return "://" in entry


def is_pattern(entry: str) -> bool:
    # A question mark is common in web addresses.
    return has_magic(entry.replace("?", "") if _is_web(entry) else entry)


def find_files(entry: str) -> list[RemoteFile]:
    """The files that a URL, a folder's URL or a pattern names; hidden ones of a folder are left out.

    Raises ConfigError if that cannot be read, TransientError if the store cannot be reached.
    """
    _refuse_other_schemes(entry)
    with errors_of(entry):
        return list(_find(entry))


@contextmanager
def errors_of(entry: str) -> Iterator[None]:
    """Raise our errors instead of those of a store's library: each has its own."""
    try:
        yield
    except TunegateError:
        raise
    except Exception as error:
        raise _translated(entry, error) from error


def file_system(entry: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, which remembers nothing of earlier calls, and the path in it."""
    import fsspec

    fs, path = fsspec.url_to_fs(entry, **_options(entry))
    fs.invalidate_cache()
    return fs, path


def info(entry: str, path: str) -> RemoteFile:
    """What the store says of one file now."""
    return _found(entry, path, file_system(entry)[0].info(path))


def _translated(entry: str, error: Exception) -> TunegateError:
    """A store's error in our words: wrong input, or something transient."""
    # fsspec says of every failure on the web that there is no such file.
    cause = (error.__cause__ if _is_web(entry) else None) or error
    status = getattr(cause, "status", None) or getattr(cause, "code", None)
    shown = without_query(entry)
    if isinstance(cause, ImportError):
        return ConfigError(_missing(entry, cause))
    if isinstance(cause, PermissionError) or status in (401, 403) or type(cause).__name__ in _NO_ACCESS:
        act = "set credentials in the environment (docs/cluster.md), and check that they may read it"
        return ConfigError(Problem("access is refused", shown, act=act))
    if isinstance(cause, FileNotFoundError) or status in (404, 410):
        return ConfigError(Problem("no such file or folder", shown, act="check the address"))
    what = f"cannot be read now: {type(cause).__name__}: {str(cause)[:200]}"
    return TransientError(Problem(what, shown, act="check the network and the address, and retry"))


def without_query(entry: str) -> str:
    return entry.partition("?")[0] if _is_web(entry) else entry


def _scheme(entry: str) -> str:
    return entry.partition("://")[0].lower()


def _is_web(entry: str) -> bool:
    return _scheme(entry) in ("http", "https")


def _refuse_other_schemes(entry: str) -> None:
    if "::" in entry:
        act = "name the file itself; .gz and .zst are unpacked anyway"
        raise ConfigError(Problem("a chain of URLs is not read", entry, "one URL", act))
    if _scheme(entry) not in SCHEMES:
        raise ConfigError(
            Problem(f"{_scheme(entry)}:// is not read", entry, _READABLE, "copy the files to one of them")
        )


def _options(entry: str) -> dict[str, Any]:
    if not _is_web(entry):
        return {}
    from aiohttp import ClientTimeout

    # Proxies and .netrc count; aiohttp would end any download after five minutes.
    patience = ClientTimeout(total=None, sock_connect=20, sock_read=60)
    return {"client_kwargs": {"trust_env": True, "timeout": patience}}


def _find(entry: str) -> Iterator[RemoteFile]:
    fs, path = file_system(entry)
    if is_pattern(entry):
        matches = fs.glob(path, detail=True)
        files = {name: facts for name, facts in matches.items() if facts["type"] == "file"}
    else:
        facts = fs.info(path)
        files = fs.find(path, detail=True) if facts["type"] == "directory" else {path: facts}
    for name in sorted(name for name in files if not _is_hidden(name, _folder(entry, path))):
        yield _found(entry, name, files[name] if _version(files[name]) else fs.info(name))


def _folder(entry: str, path: str) -> str:
    """The folder that an entry names without its pattern; hidden ones below it are not meant, as in a shell."""
    return re.split(r"[*?\[]", path)[0].rpartition("/")[0] if is_pattern(entry) else path


def _is_hidden(name: str, folder: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name.removeprefix(folder)).parts)


def _found(entry: str, path: str, facts: Mapping[str, Any]) -> RemoteFile:
    version = _version(facts)
    if version is None:
        what = "its server reports neither a hash nor a time of change, so new data could not be distinguished from old"
        raise ConfigError(Problem(what, without_query(entry), act="download it and name the file"))
    web = _is_web(entry)
    host = "" if web else urlsplit(entry).hostname or ""
    inner = f"{urlsplit(path).hostname}{urlsplit(path).path}" if web else path.strip("/")
    place = inner if web or inner.split("/")[0].lower() == host else f"{host}/{inner}"
    return RemoteFile(path, place.strip("/"), version, facts.get("size"))


def _version(facts: Mapping[str, Any]) -> str | None:
    plain = {name.replace("-", "").replace("_", "").lower(): value for name, value in facts.items()}
    names = [name for name in _HASHES if plain.get(name)] or [name for name in _TIMES if plain.get(name)][:1]
    return " ".join(f"{name}={_plain(plain[name])}" for name in [*names, "size"] if name in plain) if names else None


def _plain(value: Any) -> str:
    """The same text whether a file was found in a listing or asked for alone: stores quote and type them differently."""
    return str(value.timestamp() if isinstance(value, datetime) else value).strip('"')


def _missing(entry: str, error: ImportError) -> Problem:
    package = SCHEMES[_scheme(entry)]
    act = f"pip install '{package}'" if package else str(error)
    return Problem(f"{_scheme(entry)}:// needs a package that is not installed", entry, act=act)
