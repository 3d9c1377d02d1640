"""What the pipeline costs in addition to the work: Prefect, MLflow, Great Expectations and our own code.

Run: python -m benchmarks.overhead [demo] [--set KEY=VALUE ...]

It runs a preset in an empty store, in this process, and takes from the wall time what its workers took (a worker is the bare
work: `python -m tasks.training.workers.train_adapter spec.json out/`, its own imports included). Then it runs the preset again, when
nothing is new, and checks once with `tunegate watch`, both as a schedule would, against a Prefect server that is up.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from flows.config.load import load_spec
from flows.services.environment import make_homes, prepare_environment
from tests.support.servers import COMMAND, prefect_server

TARGET_SHARE, TARGET_SECONDS, TARGET_CPU_SECONDS = 0.10, 60, 15


def whole_run(preset: str, changes: list[str]) -> tuple[float, dict[str, float]]:
    """Seconds from the start of this process to the end of the run, and those of each worker in it."""
    spec = load_spec(preset, changes).spec
    prepare_environment(spec.store)
    make_homes(spec.store)
    from flows.retrain import retrain
    from tasks.runtime import processes

    workers: dict[str, float] = {}
    follow = processes.follow

    def timed(child: "subprocess.Popen[str]", *watching: processes.Watch) -> None:
        started = time.monotonic()
        follow(child, *watching)
        workers[f"{len(workers) + 1} {child.args[2].rpartition('.')[2]}"] = time.monotonic() - started

    processes.follow = timed
    if retrain(spec) is None:
        raise SystemExit("another run is at work in this store")
    return time.time() - psutil.Process().create_time(), workers


def cpu_of(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Wall and CPU seconds (user and system, with its children) of one command."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run([*COMMAND, *command], check=True, env=environment, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.monotonic() - started, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="demo")
    parser.add_argument("--set", action="append", default=[], dest="changes")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        changes = [*given.changes, f"store.root={folder}/store"]
        with prefect_server(Path(folder)) as environment:
            os.environ["PREFECT_API_URL"] = environment["PREFECT_API_URL"]
            total, workers = whole_run(given.preset, changes)
            sets = [text for change in changes for text in ("--set", change)]
            again = cpu_of(["run", given.preset, *sets], environment)
            check = cpu_of(["watch", given.preset, *sets], environment)
    show(given.preset, total, workers, again, check)


def show(
    preset: str, total: float, workers: dict[str, float], again: tuple[float, float], check: tuple[float, float]
) -> None:
    table = Table(title=f"the run of {preset}, seconds", title_justify="left")
    for column in ("", "wall"):
        table.add_column(column, justify="right" if column else "left")
    for name, seconds in workers.items():
        table.add_row(f"worker {name}", f"{seconds:.1f}")
    work = sum(workers.values())
    table.add_row("all workers", f"{work:.1f}")
    table.add_row("whole run", f"{total:.1f}")
    table.add_row("outside the workers", f"{total - work:.1f}, {(total - work) / work:.0%}")
    console = Console(width=100)
    console.print(table)
    console.print(f"aim: at most {TARGET_SHARE:.0%} or {TARGET_SECONDS} s outside the workers")
    for name, (wall, cpu) in {"a run with nothing new": again, "a check with nothing new": check}.items():
        console.print(f"{name}: {wall:.1f} s wall, {cpu:.1f} s of CPU (aim: under {TARGET_CPU_SECONDS})")


if __name__ == "__main__":
    sys.exit(main())
