"""Jobs and reports of the evaluation's workers: score models, and list the items of benchmarks."""

from data_contracts.data_reports import Report
from data_contracts.jobs import Job
from data_contracts.reports import Quantisation, SampleAnswer, TaskScore
from data_contracts.train_spec import Method


class AdaptedModel(Report):
    """A base model as a worker loads it: alone, with an adapter on it or merged into it, or replaced by own weights."""

    method: Method
    adapter_folder: str | None  # all weights if the method is full; None: the base alone
    quantisation: Quantisation | None  # of the base; None: full precision
    merged: bool  # the adapter is added to the base's weights, which are then rounded to 16 bits


class ScoredModel(AdaptedModel):
    """A model to score, by the name of its target."""

    name: str


class EvaluateJob(Job):
    """Score models with lm-eval. The settings are those of data_contracts.run_spec.EvaluateSpec.

    Without tasks the models only answer the sample questions.
    """

    base: str  # folder
    test: str  # JSONL file of the test split
    targets: list[ScoredModel]
    before: dict[str, str | None]  # target -> precision and device of an earlier result; the same is not scored again
    precision: str
    threads: int | None
    max_tokens: int  # longest item
    tasks: list[str]
    task_folder: str | None
    max_items: int
    task_limit: int | None
    generate_items: int
    generate_tokens: int
    batch_tokens: int
    sample_questions: int
    sample_tokens: int


class TargetResult(Report):
    """What one model scored: `result.json` next to its per-item samples."""

    scores: list[TaskScore]
    scored_in: str  # precision and kind of device; only numbers scored in the same may be compared
    answers: list[SampleAnswer]
    ms_per_token: float | None  # median over the sample answers
    seconds: float


class StoredResult(TargetResult):
    """A target's result as the store keeps it."""

    overlap_accuracy: float | None


class EvaluationReport(Report):
    """results: of the targets that were scored now."""

    results: dict[str, TargetResult]
    items: int
    overlap_accuracy: float | None  # how often word overlap alone picks the true answer; None without choices
    peak_bytes: int  # of the process


class BenchmarkItemsJob(Job):
    """List the items of lm-eval tasks as texts."""

    tasks: list[str]
    task_folder: str | None
