"""A throwaway Postgres on loopback, from the binaries that Debian's package postgresql installs."""

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.servers import free_port


def binaries() -> Path:
    """Where initdb and postgres are; skips if they are nowhere, unless REQUIRE_POSTGRES=1."""
    found = [Path(path).parent for path in [shutil.which("initdb")] if path]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    if not found:
        (pytest.fail if os.environ.get("REQUIRE_POSTGRES") == "1" else pytest.skip)(
            "no Postgres: apt install postgresql"
        )
    return found[-1]


def _not_root() -> dict[str, Any]:
    """Postgres refuses to run as root."""
    if os.getuid() != 0:
        return {}
    names = {user.pw_name for user in pwd.getpwall()}
    user = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


@contextmanager
def postgres() -> Iterator[dict[str, str]]:
    """An empty cluster, and how its superuser enters it, as psql and libpq read it from the environment."""
    where, who = binaries(), _not_root()
    password, port = secrets.token_hex(12), free_port()
    # pytest's folders are closed to other users.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        if who:
            os.chown(folder, who["user"], who["group"])
        data, given = Path(folder, "data"), Path(folder, "password")
        given.write_text(password)
        given.chmod(0o644)
        initdb = [where / "initdb", "--pgdata", data, "--username", "postgres", "--pwfile", given]
        initdb += ["--auth", "scram-sha-256", "--encoding", "UTF8", "--no-locale", "--no-sync"]
        subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, cwd="/", **who)
        command = [where / "postgres", "-D", data, "-p", str(port), "-c", "listen_addresses=127.0.0.1"]
        command += ["-c", "unix_socket_directories=", "-c", "fsync=off"]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd="/", **who)
        try:
            ready = [where / "pg_isready", "--host", "127.0.0.1", "--port", str(port), "--timeout", "1"]
            while (
                process.poll() is None and subprocess.run(ready, check=False, stdout=subprocess.DEVNULL).returncode != 0
            ):
                time.sleep(0.2)
            yield {"PGHOST": "127.0.0.1", "PGPORT": str(port), "PGPASSWORD": password, "POSTGRES_USER": "postgres"}
        finally:
            process.send_signal(signal.SIGINT)  # closes connections, then ends
            process.wait(30)
