"""Grouped inputs of stages with many parameters: frozen groups of inputs, typed from the flow to the step.

In a cache key a group counts by its fields, as single arguments do: files, adapters and bases by their content
(tasks/pipeline/policies.py), and what changed is named field by field (tasks/pipeline/cache_reasons.py). So a field has a
name that no other argument of its stage has.
"""

from typing import Final

from pydantic import BaseModel, ConfigDict

from data_contracts.data_reports import DatasetManifest, FileRef, Snapshot, ValidatedData
from data_contracts.data_spec import ContractSpec, RulesSpec
from data_contracts.reports import AdapterRef, BaseModelRef, EvalReport, Origin, TrainReport
from data_contracts.rows import Action
from data_contracts.run_spec import EvaluateSpec
from data_contracts.train_spec import Method, TrainSpec
from data_contracts.verdict import Comparison, GateReport

HASHED_ONLY: Final = "hashed only"
"""Annotation of a stage's parameter that its function does not read. It is there for the cache key: content that the stage
reads by another way (a source's files, the rows of a contract) must change the key when it changes."""


class StageInputs(BaseModel):
    """A group of arguments of one stage."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=False)


class ValidationInputs(StageInputs):
    """A snapshot, and what its rows and the whole batch must keep."""

    snapshot: Snapshot
    rules: RulesSpec
    contract: ContractSpec
    released: list[tuple[str, str]]  # (row id, reason) of quarantined rows that a person has released
    reference: tuple[str, FileRef] | None  # snapshot id and data of the batch before; None: the first batch


class CurationInputs(StageInputs):
    """Validated rows, the ledger that keeps their splits, and what must not be in the training rows."""

    validated: ValidatedData
    scope: str  # name of the model: its ledger
    contradictions: Action
    benchmarks: FileRef | None  # items of public benchmarks; None: no decontamination


class StartInputs(StageInputs):
    """The version that a warm start may resume from, and the rows there are now."""

    origin: Origin
    base: BaseModelRef
    step0: AdapterRef  # the fresh adapter that it would replace
    train: FileRef
    held_out: list[FileRef]


class TrainInputs(StageInputs):
    """All that decides what an arm learns. Two arms with equal inputs are one training."""

    method: Method
    seed: int
    base: BaseModelRef
    step0: AdapterRef | None  # None: training begins with the base itself
    rows: FileRef
    validation: FileRef
    settings: TrainSpec
    precision: str


class EvaluationInputs(StageInputs):
    """What all evaluations of a run have in common: base, items, settings, arithmetic."""

    base: BaseModelRef
    test: FileRef
    spec: EvaluateSpec
    task_files: FileRef | None  # the user's own lm-eval tasks, by content
    max_tokens: int  # of a held-out row, as in training
    precision: str  # may be auto
    threads: int | None  # no part of a key


class RunResult(StageInputs):
    """Everything a run has found out when its gates have spoken: what is recorded, registered and reported.

    `candidate` is the one adapter that may be released: the first seed's of the candidate arm.
    """

    base: BaseModelRef
    dataset: DatasetManifest
    candidate: TrainReport
    arms: list[TrainReport]
    evaluations: list[EvalReport]
    comparison: Comparison
    gate: GateReport
    champion: str | None  # label of the version it was compared with; None: none was in production

    @property
    def scores(self) -> EvalReport:
        """The candidate's evaluation."""
        return next(report for report in self.evaluations if report.target == self.candidate.name)
