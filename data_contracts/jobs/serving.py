"""The job of the server process, the lines of its stdin, and its report."""

from data_contracts.data_reports import Report
from data_contracts.jobs import Job

BASE = "base"
"""How clients name the untuned base of the served version."""


class ServedVersion(Report):
    """A version as the registry knows it."""

    name: str
    version: str
    alias: str | None
    adapter_folder: str
    meta_file: str
    adapter_sha256: str

    @property
    def label(self) -> str:
        """How an answer names the version that wrote it."""
        return f"{self.name}/{self.version}"


class Assignment(Report):
    """Which version answers clients, and which one is compared with it in the shadow. A line on the server's stdin."""

    served: ServedVersion
    shadow: ServedVersion | None


class RequestLimits(Report):
    """prompt_tokens, answer_tokens: the longest. requests: at work or waiting at the same time."""

    prompt_tokens: int
    answer_tokens: int
    requests: int


class ServeJob(Job):
    """Answer over HTTP with registered versions."""

    assignment: Assignment  # at the start
    host: str
    port: int  # 0: a free one
    on_loopback: bool  # requests must name this machine as their host
    limits: RequestLimits
    shadow_file: str | None  # None: no shadow


class ServeReport(Report):
    answered: dict[str, int]  # requests by version
