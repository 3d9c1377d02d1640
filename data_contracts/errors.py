"""Every error Tunegate raises on purpose, and the exit code it ends with.

TunegateError
├── GateError             exit 1: a gate said no, so nothing was changed
├── InputError            exit 2: what you gave is wrong; a retry changes nothing
│   ├── ConfigError         a preset, a `--set`, a model or a task name
│   └── DataError           rows, files, the data contract
└── InfrastructureError   exit 4: the machine, a server or a library failed
    ├── StoreError          disk, database or registry
    ├── WorkerError         a child process failed or was killed
    └── TransientError      the only kind that is retried
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: what, where, the limit it broke, and what to do next."""

    what: str
    where: str = ""
    limit: str = ""
    act: str = ""

    def __str__(self) -> str:
        parts = [f"{self.where}: {self.what}" if self.where else self.what]
        parts += [f"limit: {self.limit}"] if self.limit else []
        parts += [f"next: {self.act}"] if self.act else []
        return "\n    ".join(parts)


class TunegateError(Exception):
    """All problems found, not only the first. Holds only its positional arguments, so it pickles."""

    exit_code = 4

    def __init__(self, *problems: Problem) -> None:
        super().__init__(*problems)
        self.problems: Sequence[Problem] = problems

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class GateError(TunegateError):
    """A gate said no, so nothing was changed."""

    exit_code = 1


class InputError(TunegateError, ValueError):
    """What the user gave is wrong."""

    exit_code = 2


class ConfigError(InputError):
    """A preset, a `--set`, a model or a task name is wrong."""


class DataError(InputError):
    """Rows, files or the data contract are wrong."""


class InfrastructureError(TunegateError, RuntimeError):
    """The machine, a server or a library failed."""


class StoreError(InfrastructureError):
    """The disk, the database or the registry failed."""


class WorkerError(InfrastructureError):
    """A child process failed or was killed."""


class TransientError(InfrastructureError):
    """Transient: a retry may succeed."""


ERRORS: dict[str, type[TunegateError]] = {
    cls.__name__: cls
    for cls in (
        TunegateError, GateError, InputError, ConfigError, DataError,
        InfrastructureError, StoreError, WorkerError, TransientError,
    )
}  # fmt: skip


def error_chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it. The chain ends at one of our own errors, which names its cause itself."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        yield link
        if isinstance(link, TunegateError):
            return
        seen.add(id(link))
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
