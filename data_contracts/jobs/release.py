"""What is asked of the workers that load a registered version back, and what they report."""

from data_contracts.data_reports import Report
from data_contracts.jobs import Job


class LoadJob(Job):
    """A registered version to load as anybody does."""

    tracking_uri: str
    model: str  # folder of its verified files
    label: str  # NAME version N
    store: str  # root of the store, where its base is found


class AskJob(Job):
    """Questions for a registered version."""

    version: LoadJob
    questions: list[str]
    max_new_tokens: int  # of each answer


class AskReport(Report):
    answers: list[str]


class CheckSample(Job):
    """A sample question. prompt and next_tokens: as they were evaluated; None: nothing was kept to compare with."""

    question: str
    prompt: str | None
    next_tokens: list[tuple[int, float]] | None  # (id, log-probability in nats) of the likeliest


class CheckReleaseJob(Job):
    """A registered version, and sample questions of its evaluation."""

    version: LoadJob
    samples: list[CheckSample]
    max_new_tokens: int


class CheckReleaseReport(Report):
    answers: list[str]
    differences: list[float | None]  # in nats, of each sample; None where no tokens were kept
    ms_per_token: float  # the median over the samples
    peak_bytes: int
    precision: str  # what the model computes in: fp32, bf16
