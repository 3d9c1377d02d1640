"""What steps hand to each other: small manifests (a path and a sha256), never frames or models.

Paths are relative to the store's root, so a store can be moved. All are frozen pydantic models that Prefect
keeps as JSON.
"""

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Verdict = Literal["pass", "fail", "inconclusive"]
Interval = tuple[float, float]


class Report(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRef(Report):
    """A file or folder of the store: its relative path and the sha256 of its content."""

    path: str
    sha256: str


# --- data ---------------------------------------------------------------------------------------------------


class SourceFile(Report):
    name: str
    format: str
    rows: int
    sha256: str


class Snapshot(Report):
    """Every row that came in, readable or not, in parts: Parquet files with the columns row_id, source, line, raw,
    messages (JSON pairs of role and text; null if the row cannot be read), reason, detail."""

    id: str
    parts: list[FileRef]
    rows_in: int
    unreadable: int
    sources: list[SourceFile]


class Repaired(Report):
    """One repair: how many rows it changed, and the first of them before and after, with personal data masked."""

    rows: int
    examples: list[str]


class Drift(Report):
    """This batch against the one before: Kolmogorov-Smirnov distances of lengths, Kullback-Leibler divergences (nats) of
    shares. Empty without an earlier batch."""

    reference: str | None  # snapshot id
    values: dict[str, float]


class ValidatedData(Report):
    """Rows that passed the rules, rows in quarantine with their reason, and the batch contract's result.

    `kept` are Parquet parts with the columns row_id, source, line, messages, language.
    """

    snapshot_id: str
    kept: list[FileRef]
    quarantine: FileRef
    rows_in: int
    rows_kept: int
    reasons: dict[str, int]
    flags: dict[str, int]
    repairs: dict[str, Repaired]
    languages: dict[str, int]
    drift: Drift
    profile: FileRef
    contract_result: FileRef
    data_docs: str


class DatasetManifest(Report):
    """The splits. rows_in = kept + quarantined + duplicates, and kept = sum of the splits."""

    snapshot_id: str
    rows_in: int
    kept: int
    quarantined: int
    duplicates: int
    exact_duplicates: int
    near_duplicates: int
    reasons: dict[str, int]
    flags: dict[str, int]
    repairs: dict[str, Repaired]
    languages: dict[str, int]
    drift: Drift
    splits: dict[str, int]
    known_rows: int
    contamination: dict[str, int]  # train rows taken out, by what they share most of an item with
    train: FileRef
    validation: FileRef
    test: FileRef
    quarantine: FileRef
    duplicate_rows: FileRef
    contract_result: FileRef
    data_docs: str


class DataState(Report):
    """The newest data set of a model, with what it was made from."""

    snapshot: Snapshot
    validated: ValidatedData
    dataset: DatasetManifest


class RowStory(Report):
    """All that is known about one row."""

    row_id: str
    source: str
    line: int
    raw: str
    read: list[list[str]] | None  # pairs of role and text before any repair; None if it could not be read
    now: dict[str, Any]  # the file it lies in, and its line there
    history: list[list[str | None]]  # snapshot, fate, reason, split
    releases: list[dict[str, Any]]


# --- models -------------------------------------------------------------------------------------------------


class BaseModelRef(Report):
    """A base model in the store or on this machine, named by the digest of its files."""

    name: str  # what the user asked for
    digest: str
    path: str  # relative to the store; a link if the files lie elsewhere
    note: str  # what "full precision" means for this base
    revision: str | None
    stops: list[str]  # tokens that end an answer
    chat_template: str | None  # given to a base that has none of its own


class AdapterRef(Report):
    """A LoRA adapter: its folder, and the sha256 of adapter_model.safetensors."""

    folder: str
    sha256: str


class LossPoint(Report):
    step: int
    loss_nats: float
    learning_rate: float
    seconds: float


class TrainReport(Report):
    """One trained arm. Memory in bytes: the base's weights as stored, the peak of the worker process from its start, and
    the peak while it trained (device memory on CUDA, resident memory on a CPU)."""

    method: Literal["lora", "qlora"]
    seed: int
    adapter: AdapterRef
    step0_sha256: str
    steps: int
    resumed_from_step: int
    train_rows: int
    rows_too_long: int
    train_tokens: int
    completion_tokens: int
    trainable_parameters: int
    weights_bytes: int
    peak_rss_bytes: int
    peak_train_bytes: int
    seconds: float
    train_seconds: float
    useful_tokens_per_s: float
    final_validation_nll_nats: float | None
    loss: list[LossPoint]
    precision: str
    precision_reason: str
    threads: int
    threads_reason: str
    device: str


class EvalTarget(Report):
    """A model to score: the base itself, or an adapter on the base in the form that it was trained on."""

    name: str
    method: Literal["lora", "qlora"]
    adapter: AdapterRef | None = None  # its folder may be absolute: the registry's


class SampleAnswer(Report):
    question: str
    reference: str
    answer: str


class TaskScore(Report):
    """One lm-eval metric; per-item values lie in the samples file, and intervals are computed from those."""

    task: str
    metric: str
    value: float
    items: int


class EvalReport(Report):
    """One model on the frozen items."""

    target: str  # base, lora, qlora, champion
    adapter_sha256: str | None
    items_sha256: str
    nll_nats: float | None
    accuracy: float | None
    accuracy_interval: Interval | None
    lexical_baseline_accuracy: float | None
    items: int
    scores: list[TaskScore]
    samples: FileRef  # JSONL: row_id, task, values
    answers: list[SampleAnswer]
    seconds: float

    @property
    def perplexity(self) -> float | None:
        return None if self.nll_nats is None else math.exp(self.nll_nats)


# --- verdict ------------------------------------------------------------------------------------------------


class Comparison(Report):
    """LoRA against QLoRA: quality paired by item, memory and speed by process."""

    candidate: str
    nll_nats: dict[str, float]
    nll_gain_ci95: dict[str, Interval]  # base minus model, for the champion champion minus candidate; nats per token
    accuracy: dict[str, float]
    accuracy_gain_ci95: dict[str, Interval]
    retention: float | None
    retention_ci95: Interval | None
    accuracy_drop: float | None
    accuracy_drop_ci95: Interval | None
    memory_saving: float | None
    weights_saving: float | None
    speed_ratio: float | None
    items: int
    claims: list[str]


class GateResult(Report):
    name: str
    threshold: float | None
    actual: float | None
    interval: Interval | None
    verdict: Verdict
    why: str


class GateReport(Report):
    gates: list[GateResult]
    verdict: Verdict


class ModelVersion(Report):
    name: str
    version: str
    aliases: list[str]
    run_id: str


class LoadedBack(Report):
    """What the registered version answered in a fresh process, and whether it is what was evaluated."""

    question: str
    answer: str
    as_evaluated: bool | None  # None if no sample question was evaluated


class RecordedRun(Report):
    """The MLflow parent run and its child for each arm."""

    mlflow_run_id: str
    arm_run_ids: dict[str, str]


class Stage(Report):
    name: str
    status: Literal["ran", "cached", "skipped"]
    seconds: float


class RunReport(Report):
    """Everything a run has to say. `tunegate run --json` prints `summary()`."""

    run_id: str
    spec: dict[str, Any]
    dataset: DatasetManifest
    base: BaseModelRef
    arms: list[TrainReport]
    evaluations: list[EvalReport]
    comparison: Comparison
    gate: GateReport
    recorded: RecordedRun
    model: ModelVersion
    loaded_back: LoadedBack
    stages: list[Stage]
    html: str
