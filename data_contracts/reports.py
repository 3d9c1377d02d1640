"""What the stages after the data hand to each other: small manifests, never models.

Paths are relative to the store's root, so a store can be moved. All are frozen pydantic models that Prefect
keeps as JSON.
"""

import math
from typing import Any, Literal

from data_contracts.data_reports import DatasetManifest, FileRef, Note, Report
from data_contracts.train_spec import Method, QuantType
from data_contracts.verdict import Comparison, GateReport, Interval

# --- models -------------------------------------------------------------------------------------------------


class BaseModelRef(Report):
    """A base model in the store or on this machine, named by the digest of its files."""

    name: str  # what the user asked for
    digest: str
    path: str  # relative to the store; a link if the files are elsewhere
    note: str  # what "full precision" means for this base
    revision: str | None
    stops: list[str]  # tokens that end an answer
    chat_template: str | None  # given to a base that has none of its own
    licence: str = "unknown"  # SPDX id or words


class AdapterRef(Report):
    """What an arm has learned: the folder of its adapter, or of all weights if its method is full; and their sha256."""

    folder: str
    sha256: str


class Origin(Report):
    """The registered version that a warm start may resume from, in the champion's line; or why there is none."""

    note: Note  # the version by name; or why an arm starts from scratch
    version: str | None = None
    method: Method | None = None
    base_digest: str | None = None
    adapter: AdapterRef | None = None  # where the registry has it
    trained: FileRef | None = None  # ids of the rows it was trained on, its ancestors' included


class Start(Report):
    """Where the training of an arm begins that was to resume from the champion, and on which rows."""

    version: str | None  # of the model; None: from scratch, on all training rows
    note: Note  # that version by name; or why from scratch
    adapter: AdapterRef | None  # None: the fresh one
    rows: FileRef
    new_rows: int
    old_rows: int  # that the version was trained on, and that are still here
    replayed_rows: int  # of the old ones
    trained: FileRef | None  # ids of these rows and of all that its ancestors saw; None: of these alone


class Quantisation(Report):
    """How a base was quantised to 4 bits: another way gives other weights, on which an adapter does not fit."""

    quant_type: QuantType
    double_quant: bool


class Slot(Report):
    """Where one of several arms trains that train at the same time."""

    gpu: str | None  # as CUDA_VISIBLE_DEVICES names it; None: on the CPU
    threads: int
    why: str
    arms_at_once: int  # that train at the same time, this one included


class LossPoint(Report):
    step: int
    loss_nats: float
    learning_rate: float
    seconds: float


class ValidationPoint(Report):
    step: int
    nll_nats: float


class PlannedMemory(Report):
    """What the formulas of `tunegate plan` say of the largest step's peak, in bytes: the parts of `predicted_train_bytes`."""

    process: int  # libraries, kernels, what the allocator cannot use; on CUDA 0: tensors alone are counted
    weights: int  # of the base, with quantisation constants
    adapters: int
    optimiser: int
    gradients: int  # those alive at the peak
    activations: int
    logits: int


class MeasuredMemory(Report):
    """What `peak_train_bytes` is made of, in bytes. Tensors were counted; activations and logits come and go within a
    step, so they are what is left, with the gradients then alive, kernels that are compiled for bf16 on a CPU, and what the
    allocator cannot use."""

    process: int  # before the base was loaded: libraries and rows; on CUDA 0
    weights: int
    adapters: int
    optimiser: int
    rest: int


class TrainReport(Report):
    """One trained arm. Memory in bytes: the base's weights as stored, the peak of the worker process from its start, and
    the peak while it trained (device memory on CUDA, resident memory on a CPU), measured and as planned."""

    name: str  # unique in the run: the arm's, with its seed if there are several
    arm: str  # what it is compared as over the seeds: its method, or a variant's name
    method: Method
    seed: int
    adapter: AdapterRef
    step0_sha256: str | None  # None: training began with the base itself
    quantisation: Quantisation | None  # of the base; None in full precision
    steps: int
    resumed_from_step: int
    train_rows: int
    rows_too_long: int
    too_long: Literal["left out", "truncated", "split"]  # what was done with them
    train_tokens: int
    completion_tokens: int
    trainable_parameters: int
    weights_bytes: int
    peak_rss_bytes: int
    peak_train_bytes: int
    predicted_train_bytes: int | None  # None for a base that the planner has no formulas for
    planned_memory: PlannedMemory | None = None  # as above
    measured_memory: MeasuredMemory | None = None  # None: weights are divided among workers
    gradients_bytes: int | None = None  # of one step, all together: at the peak not all need be alive
    seconds: float
    train_seconds: float
    useful_tokens_per_s: float
    final_validation_nll_nats: float | None
    validation: list[ValidationPoint]  # while it trained
    best_step: int | None  # the step whose adapter is kept, by validation loss; None: the last
    stopped_early: bool
    micro_batches: int  # parts an optimiser step was computed in at the end: over 1, memory ran out
    batch: str = ""  # rows and tokens of a step
    batch_reason: str = ""
    loss: list[LossPoint]
    precision: str
    precision_reason: str
    threads: int
    threads_reason: str
    workers: int = 1  # processes that shared the work; memory is that of the largest
    scoring: Literal["packed", "padded"]
    scoring_reason: str
    device: str
    device_reason: str = ""
    side_by_side: int = 1  # arms that trained at the same time: over 1, speeds are those of a shared machine
    start: Start | None = None  # None: warm_start is never, so from scratch


class EvalTarget(Report):
    """A model to score: the base itself, an adapter on the base in the form that it was trained on or may be served in,
    or own weights."""

    name: str
    method: Method
    adapter: AdapterRef | None = None  # its folder may be absolute: the registry's
    quantisation: Quantisation | None = None  # None: on the full-precision base
    merged: bool = False  # the adapter added to the base's weights, which are then rounded to 16 bits


class SampleAnswer(Report):
    """A test question as a model answered it. next_tokens: (id, log-probability in nats) of the likeliest tokens that may
    follow the prompt; None if they are not finite, or from before they were kept."""

    question: str
    reference: str
    answer: str
    prompt: str | None = None
    next_tokens: list[tuple[int, float]] | None = None


class TaskScore(Report):
    """One lm-eval metric; per-item values are in the samples file, and intervals are computed from those."""

    task: str
    metric: str
    value: float
    items: int


class EvalReport(Report):
    """One model on the frozen items."""

    target: str  # base, the name of an arm, champion
    adapter_sha256: str | None
    items_sha256: str
    nll_nats: float | None  # per completion token
    bits_per_byte: float | None  # of the completion's UTF-8
    accuracy: float | None
    accuracy_interval: Interval | None
    lexical_baseline_accuracy: float | None
    items: int
    scores: list[TaskScore]
    samples: FileRef  # JSONL: task, metric, row_id, value, tokens
    facts: FileRef  # JSONL, one line for each domain item: row_id, cluster, bytes, and its slices: source, language, length
    answers: list[SampleAnswer]
    ms_per_token: float | None  # of a written token, one answer at a time: the median over the sample answers
    seconds: float
    precision: str | None = None

    @property
    def perplexity(self) -> float | None:
        return None if self.nll_nats is None else math.exp(self.nll_nats)


# --- the run ------------------------------------------------------------------------------------------------


class ModelVersion(Report):
    name: str
    version: str
    aliases: list[str]
    run_id: str


class ReleaseCheck(Report):
    """A registered version, loaded in a fresh process, held against what was evaluated of it.

    difference_nats: between the log-probabilities of next tokens then and now, of the question where they differ most; None
    if none were compared.
    """

    questions: int
    answered_alike: int  # with the same text as in the evaluation
    difference_nats: float | None
    tolerance_nats: float
    precision: str  # here; what it was evaluated in may be another
    ms_per_token: float
    peak_bytes: int
    seconds: float
    refusals: list[str]  # what speaks against its release


class LoadedBack(Report):
    """What the registered version answered in a fresh process, and whether it is what was evaluated."""

    question: str
    answer: str
    as_evaluated: bool | None  # None if no sample question was evaluated
    check: ReleaseCheck | None = None  # None: a run from before there was one


class RecordedRun(Report):
    """The MLflow parent run and its child for each arm."""

    mlflow_run_id: str
    arm_run_ids: dict[str, str]


class Stage(Report):
    name: str
    status: Literal["ran", "cached", "skipped"]
    seconds: float
    why: str = ""  # it ran or was skipped


class RunReport(Report):
    """Everything a run has to say. `tunegate run --json` prints `summary()`."""

    run_id: str
    reason: str = ""  # why it was started
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
