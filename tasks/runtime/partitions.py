"""The same work on every part of the data, on all cores or on a Ray cluster; a part that was done before is not redone.

The result of a part is a folder of the store, named by what it depends on. Appending rows to a source leaves its full
parts as they are, so only new rows are worked on.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from data_contracts.errors import ConfigError, Problem, TransientError
from tasks.runtime.processes import Display, free_cores
from tasks.runtime.store import Store


class Job(NamedTuple):
    """Work on one part: `key` names everything its result depends on."""

    key: str
    arguments: dict[str, Any]


# Called with the arguments of a job and the empty folder to fill.
Work = Callable[[dict[str, Any], Path], None]


def map_parts(store: Store, kind: str, work: Work, jobs: list[Job], engine: str, force: bool = False) -> list[Path]:
    """Do every job that has no result yet; answer with the folders of all, in the order of the jobs.

    `work` is a function of a module, so that another process can import it. What it raises is raised here.
    """
    folders = [store.files / kind / job.key for job in jobs]
    missing = [job for job, folder in zip(jobs, folders, strict=True) if force or not folder.exists()]
    run = {"local": _locally, "ray": _on_ray}[engine]
    with Display(kind) as display:
        for done, _ in enumerate(run(store, kind, work, missing), start=1):
            display.show({"event": "progress", "what": f"{kind}, parts", "done": done, "of": len(missing)})
    return folders


def _publish(store: Store, kind: str, work: Work, job: Job) -> None:
    with store.publish(kind, job.key) as folder:
        work(job.arguments, folder)


def _locally(store: Store, kind: str, work: Work, jobs: list[Job]) -> Iterator[None]:
    """Processes, not threads: the work is Python. Few parts are done here, without the second a process takes."""
    cores = min(free_cores(), len(jobs))
    if cores < 2:
        for job in jobs:
            _publish(store, kind, work, job)
            yield
        return
    with ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_publish, store, kind, work, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            act = "it goes on from the parts that are done; if memory ran out, free some"
            raise TransientError(Problem("a process was killed", kind, act=act)) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _on_ray(store: Store, kind: str, work: Work, jobs: list[Job]) -> Iterator[None]:
    """Ray Data spreads the jobs over its cluster; every machine must see the store under the same path."""
    try:
        import ray
    except ImportError as error:
        act = "pip install 'tunegate[ray]'"
        raise ConfigError(Problem("Ray is not installed", "data.engine", "local or ray", act)) from error

    if not jobs:
        return
    there = Store(store.root.resolve())
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False

    def publish(row: dict[str, Any]) -> dict[str, Any]:
        _publish(there, kind, work, jobs[row["id"]])
        return {"id": row["id"]}

    # One block a job, so that each can run anywhere.
    yield from (None for _ in ray.data.range(len(jobs), override_num_blocks=len(jobs)).map(publish).iter_rows())
