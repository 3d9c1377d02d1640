"""The comparison of a run's models: estimates with their intervals, gates, the verdict."""

from typing import Annotated, Literal

from pydantic import AliasChoices, Field

from data_contracts.data_reports import Note, Report

Verdict = Literal["pass", "fail", "inconclusive"]
Interval = tuple[float, float]


class Estimate(Report):
    """A number from a sample of items and seeds. Each end of the interval is a one-sided bound at the gates' confidence:
    together they are the interval of twice the error (90 % for 95 %), as equivalence tests use it."""

    value: float
    low: float
    high: float
    error: float  # standard error
    items: int = 1  # clusters of items behind it
    seeds: int = 1
    seed_share: float = 0.0  # of the error's square that comes from seeds, not from items

    @property
    def interval(self) -> Interval:
        return (self.low, self.high)


class SliceGain(Report):
    """The released adapter's gain over the base on the items that share a property, in nats per token."""

    kind: str  # source, language, length, or field: the user's own
    name: str
    items: int
    gain: Estimate


class TaskChange(Report):
    """The released adapter against the base in a task beyond the domain; higher is better, so a loss comes negated."""

    task: str
    metric: str
    items: int
    base: float
    candidate: float
    change: Estimate
    p: float | None = None  # exact McNemar test, adjusted over the tasks by Holm's method; None for a loss


class Flips(Report):
    """Items that one model answers right and the other wrong."""

    lost: int  # LoRA right, candidate wrong
    won: int
    rate: float
    p: float  # exact McNemar test


class Claim(Report):
    """What articles say of QLoRA, checked against what this run measured."""

    claim: str
    source: str
    measured: Estimate | None
    verdict: Literal["holds", "does not hold", "cannot tell"]
    note: Note


class Comparison(Report):
    """Every model on the same items: quality paired by item, over the seeds where an arm has several; costs by process.

    `released` is the one adapter that may be registered, the candidate arm's first seed: its numbers are those of
    that adapter; the numbers of an arm are over its seeds.
    """

    candidate: str  # an arm
    released: str  # a trained adapter of that arm
    items: int
    clusters: int  # of items that share their answer; these are resampled, not single items
    seeds: int
    nll_nats: dict[str, float]  # per arm, base and champion: nats per completion token, mean over seeds
    bits_per_byte: dict[str, float]
    seed_sd: dict[str, float]  # of the loss, between an arm's seeds; arms with several only
    gains: dict[str, Estimate]  # base minus arm, nats per token
    gain: Estimate | None  # base minus the released adapter
    champion_gain: Estimate | None  # champion minus the released adapter
    accuracy: dict[str, float]
    accuracy_gains: dict[str, Estimate]  # arm minus base, as a share of the items
    retention: Estimate | None
    accuracy_drop: Estimate | None  # LoRA's minus the candidate's
    flips: Flips | None
    stop_rate: Estimate | None  # of the released adapter
    slices: list[SliceGain]
    general: list[TaskChange]
    forms: dict[str, Estimate]  # loss of the released adapter in another form minus that as trained, nats per token
    memory_saving: Estimate | None  # of the peak; its ends are the lowest and highest of the seeds
    weights_saving: float | None
    speed_ratio: Estimate | None  # QLoRA's tokens per second over LoRA's
    detectable: dict[str, float]  # smallest true difference that these items and seeds find with 80 % power
    claims: list[Claim]


class Served(Report):
    """One model alone in a new process that answers the sample questions."""

    ms_per_token: float | None
    peak_bytes: int


class GateResult(Report):
    """threshold: what is `direction` it passes; None where a rule decides without one."""

    name: str
    direction: Literal["at least", "more than", "at most", ""]
    threshold: float | None
    actual: float | None
    interval: Interval | None
    verdict: Verdict
    why: str


class GateReport(Report):
    gates: list[GateResult]
    off: list[str]  # gates that the spec turns off
    verdict: Verdict


Champion = Annotated[str | None, Field(validation_alias=AliasChoices("champion", "rival"))]
"""A version's label. What 0.1 wrote calls it `rival`."""


class Decision(Report):
    """The verdict of the gates on one registered version."""

    model: str  # the URI by which it was named
    name: str
    version: str
    champion: Champion  # the version it was compared with, "NAME version N"; None: none was in production
    gate: GateReport
    comparison: Comparison
