"""Kill everything in every stage: the chain ends as if nothing had happened, and nothing is done or recorded twice.

One chain for each victim: it is killed in one stage, started again, killed in the next, and so on to the end.

Run the matrix: TUNEGATE_KILL_STAGES=all pytest tests/test_kill_chain.py -m slow -s --timeout=0
Without the variable a few stages of each; the full disk needs a file system of its own, so root on Linux.
"""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.servers import COMMAND, Server, free_port, mlflow_on, prefect_on

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

ALL = os.environ.get("TUNEGATE_KILL_STAGES") == "all"
FEW = ("curate", "train lora", "evaluate", "register")
DIALS = ["train.max_steps=24", "evaluate.generate_items=2", "evaluate.sample_tokens=4", "gates.bootstrap_draws=200"]
_STAGE = re.compile(r"^ *(ran|cached|skipped|failed)  (\S+(?: \S+)?) +[\d.]+ s")


@dataclass
class Place:
    """A store and its two servers."""

    root: Path
    prefect: Server
    mlflow: Server
    environment: dict[str, str]
    mlflow_uri: str

    @property
    def store(self) -> Path:
        return self.root / "store"

    def command(self) -> list[str]:
        dials = [*DIALS, f"store.root={self.store}", f"store.mlflow_uri={self.mlflow_uri}"]
        return [*COMMAND, "run", "smoke", "--json", *(text for dial in dials for text in ("--set", dial))]


@contextmanager
def place_at(root: Path) -> Iterator[Place]:
    prefect, environment = prefect_on(root, free_port())
    port = free_port()
    mlflow = mlflow_on(root, port)
    servers = (prefect, mlflow)
    for server in servers:
        server.start()
    try:
        yield Place(root, prefect, mlflow, environment, f"http://127.0.0.1:{port}")
    finally:
        for server in servers:
            with suppress(ProcessLookupError):
                server.kill()


class Chain:
    """One start of the command. What it prints lies in files, so that nobody has to read along."""

    def __init__(self, place: Place) -> None:
        self.out, self.errors = place.root / f"{time.monotonic_ns()}.json", place.root / f"{time.monotonic_ns()}.log"
        with self.out.open("w") as out, self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                place.command(), env=place.environment, cwd=place.root, stdout=out, stderr=errors
            )

    @property
    def said(self) -> str:
        return self.errors.read_text()

    @property
    def ended(self) -> list[tuple[str, str]]:
        """Stages that have ended, and how."""
        return [(found[2], found[1]) for found in map(_STAGE.match, self.said.splitlines()) if found]

    def ran(self) -> set[str]:
        return {name for name, status in self.ended if status == "ran"}

    def reached(self, number: int) -> bool:
        """Wait until so many stages have ended; False if the command has."""
        while self.process.poll() is None:
            if len(self.ended) >= number:
                return True
            time.sleep(0.03)
        return False

    def result(self) -> tuple[int, dict]:
        code = self.process.wait()
        text = self.out.read_text()
        return code, json.loads(text) if text else {}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Iterator[tuple[dict, dict]]:
    """An undisturbed chain, and what it left behind."""
    with place_at(tmp_path_factory.mktemp("whole")) as place:
        chain = Chain(place)
        code, result = chain.result()
        assert code == 0, chain.said
        yield result, left_behind(place)


def left_behind(place: Place) -> dict:
    """What must not be there twice: ledger rows, batches, finished runs, versions, MLflow runs by name and status."""
    with closing(sqlite3.connect(place.store / "store" / "ledger.db")) as ledger:
        rows = ledger.execute("SELECT row_id, fate, reason, split FROM rows ORDER BY row_id").fetchall()
        counts = [ledger.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0] for table in ("batches", "finished")]
    with closing(sqlite3.connect(place.root / "mlflow.db")) as mlflow:
        versions = mlflow.execute("SELECT name, version FROM model_versions").fetchall()
        aliases = mlflow.execute("SELECT alias, version FROM registered_model_aliases ORDER BY alias").fetchall()
        runs = mlflow.execute("SELECT name, status FROM runs WHERE lifecycle_stage = 'active'").fetchall()
    moves = (place.store / "store" / "promotions.jsonl").read_text().count("\n")
    return {
        "rows": rows, "batches and finished runs": counts, "versions": versions, "aliases": aliases,
        "runs": Counter(status for _, status in runs), "promotions": moves,
    }  # fmt: skip


# --- victims ------------------------------------------------------------------------------------------------


def kill_flow(place: Place, chain: Chain) -> None:
    chain.process.send_signal(signal.SIGKILL)
    chain.process.wait()


def kill_worker(place: Place, chain: Chain) -> None:
    for child in psutil.Process(chain.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if any(argument.startswith("tasks.workers.") for argument in child.cmdline()):
                child.kill()


def restart(server: Server) -> None:
    """Killed, gone for two seconds, and back, as what keeps services alive would do it."""
    server.kill()
    time.sleep(2)
    server.start()


VICTIMS: dict[str, Callable[[Place, Chain], None]] = {
    "flow": kill_flow,
    "worker": kill_worker,
    "Prefect's server": lambda place, chain: restart(place.prefect),
    "MLflow's server": lambda place, chain: restart(place.mlflow),
}


def killed_in(victim: str, stage: str, place: Place, names: list[str], seconds: float) -> tuple[str, Chain]:
    """Start the chain and strike in the middle of a stage; how it went, and the chain."""
    chain = Chain(place)
    if not chain.reached(names.index(stage)):
        return "ended before", chain
    time.sleep(seconds / 2)
    if chain.process.poll() is not None:
        return "ended before", chain
    VICTIMS[victim](place, chain)
    now = names[min(len(chain.ended), len(names) - 1)]
    code = chain.process.wait()
    return f"struck in {now}: " + {0: "it went on and finished", -9: "killed"}.get(
        code, f"ended with code {code}"
    ), chain


@pytest.mark.parametrize("victim", VICTIMS)
def test_killed_in_every_stage_the_chain_ends_as_if_nothing_had_happened(victim, whole, tmp_path, capsys):
    expected, expected_left = whole
    names = [stage["name"] for stage in expected["stages"]]
    took = {stage["name"]: stage["seconds"] for stage in expected["stages"]}
    stages = [name for name in names if ALL or name in FEW]
    assert len(stages) >= len(FEW)
    with place_at(tmp_path) as place:
        done: set[str] = set()
        for stage in stages:
            told, chain = killed_in(victim, stage, place, names, took[stage])
            assert not chain.ran() & done, f"{stage}: {chain.ran() & done} ran again\n{chain.said}"
            done |= chain.ran()
            with capsys.disabled():
                sys.stdout.write(f"{victim:<18} {stage:<14} {told}\n")
        last = Chain(place)
        code, result = last.result()
        assert code == 0, last.said
        assert not last.ran() & done, "only unfinished work is repeated"
        assert [arm["adapter_sha256"] for arm in result["arms"]] == [arm["adapter_sha256"] for arm in expected["arms"]]
        assert left_behind(place) == expected_left
