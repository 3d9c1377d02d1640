"""Kill everything in every stage: the chain ends as if nothing had happened, and nothing is done or recorded twice.

One chain for each victim: it is killed in one stage, started again, killed in the next, and so on to the end. The disk is
not killed but filled, which ends the chain, and emptied again: the store is on a small file system in memory.

Run the matrix: TUNEGATE_KILL_STAGES=all pytest tests/flows/test_kill_chain.py -m slow -s --timeout=0
Without the variable a few stages of the flow.
"""

import json
import os
import re
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tasks.runtime.processes import is_worker
from tests.support.servers import COMMAND, Server, free_port, mlflow_on, prefect_on

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

ALL = os.environ.get("TUNEGATE_KILL_STAGES") == "all"
FEW = ("curate", "train lora", "evaluate", "register")
SETTINGS = ["train.max_steps=24", "evaluate.generate_items=2", "evaluate.sample_tokens=4", "gates.bootstrap_draws=200"]
DISK_BYTES = 5 * 1024**3 // 2
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
        settings = [*SETTINGS, f"store.root={self.store}", f"store.mlflow_uri={self.mlflow_uri}"]
        return [*COMMAND, "run", "smoke", "--json", *(text for setting in settings for text in ("--set", setting))]


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system in memory at a folder, hardly larger than what a run wants to find free."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a full disk needs the right to mount one: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


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
    """One start of the command. What it prints is kept in files, so that nobody has to read along."""

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
    promotions = (place.store / "store" / "promotions.jsonl").read_text().count('"step":"done"')
    return {
        "rows": rows, "batches and finished runs": counts, "versions": versions, "aliases": aliases,
        "runs": Counter(status for _, status in runs), "promotions": promotions,
    }  # fmt: skip


# --- victims ------------------------------------------------------------------------------------------------


def kill_flow(place: Place, chain: Chain) -> bool:
    chain.process.kill()
    chain.process.wait()
    return True


def kill_worker(place: Place, chain: Chain) -> bool:
    """False in a stage that has no worker."""
    workers = list(filter(is_worker, psutil.Process(chain.process.pid).children(recursive=True)))
    for worker in workers:
        worker.kill()
    return bool(workers)


def fill_disk(place: Place, chain: Chain) -> bool:
    """Not a byte stays free until the chain has ended, which must say so and what to do. False if it needed none."""
    ballast, size = place.store / "ballast", 0
    with ballast.open("wb") as file:
        while chain.process.poll() is None:
            size = _take_what_is_free(file.fileno(), size)
            time.sleep(0.01)
    ballast.unlink()
    code, payload = chain.result()
    if code == 0:
        return False
    problem = payload["error"]["problems"][0]
    is_told = re.search("disk is full|No space left|free", problem["what"]) and "room" in problem["act"]
    assert code == 4 and is_told, chain.said[-2000:]
    return True


def _take_what_is_free(file: int, size: int) -> int:
    more = DISK_BYTES
    while more >= 4096:
        try:
            os.posix_fallocate(file, size, more)
            size += more
        except OSError:
            more //= 2
    return size


def restart(server: Server) -> bool:
    """Killed, gone for two seconds, and back, as what keeps services alive would do it."""
    server.kill()
    time.sleep(2)
    server.start()
    return True


DISK = "the disk"
VICTIMS: dict[str, Callable[[Place, Chain], bool]] = {
    "flow": kill_flow,
    "worker": kill_worker,
    "Prefect's server": lambda place, chain: restart(place.prefect),
    "MLflow's server": lambda place, chain: restart(place.mlflow),
    DISK: fill_disk,
}


class Matrix:
    """One victim, struck in stage after stage of one chain, which is started again whenever that has ended it."""

    def __init__(self, victim: str, place: Place, whole: dict) -> None:
        self.victim, self.place = victim, place
        self.names = [stage["name"] for stage in whole["stages"]]
        self.seconds = {stage["name"]: stage["seconds"] for stage in whole["stages"]}
        self.chain = Chain(place)
        self.done: set[str] = set()  # what earlier starts have finished

    def strike(self, stage: str) -> bool:
        """Strike in the middle of a stage; False if the chain is past it."""
        if self.chain.process.poll() is not None:
            self.start_again()
        if not self.chain.reached(self.names.index(stage)):
            return False
        time.sleep(self.seconds[stage] / 2)
        here = len(self.chain.ended) == self.names.index(stage) and self.chain.process.poll() is None
        return here and VICTIMS[self.victim](self.place, self.chain)

    def start_again(self) -> None:
        again = self.chain.ran() & self.done
        assert not again, f"{again} ran again\n{self.chain.said}"
        self.done |= self.chain.ran()
        self.chain = Chain(self.place)

    def finish(self) -> dict:
        """To the end, with as many starts as it takes, but no more than three."""
        for _ in range(3):
            code, result = self.chain.result()
            if code == 0:
                self.start_again()  # what it checks holds for the last start too
                assert not self.chain.result()[0]
                assert not self.chain.ran(), self.chain.said
                return result
            self.start_again()
        raise AssertionError(self.chain.said)


@pytest.mark.parametrize("victim", VICTIMS if ALL else ["flow"])
def test_killed_in_every_stage_the_chain_ends_as_if_nothing_had_happened(victim, whole, tmp_path, capsys):
    expected, expected_left = whole
    wanted = [stage["name"] for stage in expected["stages"] if ALL or stage["name"] in FEW]
    assert len(wanted) >= len(FEW)
    # A server's restart takes longer than some stages: what one chain has passed is struck in another.
    for number in range(6 if ALL else 1):
        place_root = tmp_path / str(number)
        place_root.mkdir()
        disk = small_disk(place_root / "store") if victim == DISK else nullcontext()
        with disk, place_at(place_root) as place:
            matrix = Matrix(victim, place, expected)
            struck = [stage for stage in wanted if matrix.strike(stage)]
            result = matrix.finish()
            with capsys.disabled():
                sys.stdout.write(f"\n{victim} killed in: {', '.join(struck)}")
            assert struck or number  # in the end only stages may be left that need no room on the disk
            assert adapters(result) == adapters(expected)
            assert left_behind(place) == expected_left
        wanted = [stage for stage in wanted if stage not in struck]
        if not (wanted and struck) or victim == "worker":  # most stages have none
            break


def adapters(result: dict) -> list[str]:
    return [arm["adapter_sha256"] for arm in result["arms"]]
