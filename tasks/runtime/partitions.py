"""The same work on every part of the data, on all cores or on a Ray cluster; a part that was done before is not redone.

The result of a part is a folder of the store, named by what it depends on. Appending rows to a source leaves its full
parts as they are, so only new rows are worked on.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from data_contracts.errors import ConfigError, Problem, TransientError
from tasks.runtime.processes import Display, free_cores
from tasks.runtime.store import Store

A = TypeVar("A")


class Part(NamedTuple, Generic[A]):
    """One part of the data to work on: `key` names everything its result depends on."""

    key: str
    arguments: A


# Called with the arguments of a part and the empty folder to fill.
PartWork = Callable[[A, Path], None]


def map_parts(
    store: Store, kind: str, work: PartWork[A], parts: list[Part[A]], engine: str, force: bool = False
) -> list[Path]:
    """Work on every part that has no result yet; answer with the folders of all, in the order of the parts.

    `work` is a function of a module, so that another process can import it. What it raises is raised here.
    """
    folders = [store.files / kind / part.key for part in parts]
    missing = [part for part, folder in zip(parts, folders, strict=True) if force or not folder.exists()]
    run = {"local": _locally, "ray": _on_ray}[engine]
    with Display(kind) as display:
        for done, _ in enumerate(run(store, kind, work, missing), start=1):
            display.show({"event": "progress", "what": f"{kind}, parts", "done": done, "of": len(missing)})
    return folders


def _publish(store: Store, kind: str, work: PartWork[A], part: Part[A]) -> None:
    with store.publish(kind, part.key) as folder:
        work(part.arguments, folder)


def _locally(store: Store, kind: str, work: PartWork[A], parts: list[Part[A]]) -> Iterator[None]:
    """Processes, not threads: the work is Python. Few parts are done here, without the second a process takes."""
    cores = min(free_cores(), len(parts))
    if cores < 2:
        for part in parts:
            _publish(store, kind, work, part)
            yield
        return
    with ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_publish, store, kind, work, part) for part in parts]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            act = "it resumes with the parts that are not done; if memory ran out, free some"
            raise TransientError(Problem("a process was killed", kind, act=act)) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _on_ray(store: Store, kind: str, work: PartWork[A], parts: list[Part[A]]) -> Iterator[None]:
    """Ray Data spreads the parts over its cluster; every machine must see the store under the same path."""
    try:
        import ray
    except ImportError as error:
        act = "pip install 'tunegate[ray]'"
        raise ConfigError(Problem("Ray is not installed", "data.engine", "local or ray", act)) from error

    if not parts:
        return
    there = Store(store.root.resolve())
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False

    def publish(row: dict[str, Any]) -> dict[str, Any]:
        _publish(there, kind, work, parts[row["id"]])
        return {"id": row["id"]}

    # One block a part, so that each can run anywhere.
    yield from (None for _ in ray.data.range(len(parts), override_num_blocks=len(parts)).map(publish).iter_rows())
