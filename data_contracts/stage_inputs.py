"""What a stage takes where it takes much: frozen groups of inputs, typed from the flow to the step.

In a cache key a group counts by its fields, as single arguments do: files, adapters and bases by their content
(tasks/pipeline/policies.py), and what changed is named field by field (tasks/pipeline/cache_reasons.py). So a field has a
name that no other argument of its stage has.
"""

from pydantic import BaseModel, ConfigDict

from data_contracts.data_reports import FileRef
from data_contracts.reports import AdapterRef, BaseModelRef, Origin
from data_contracts.train_spec import Method, TrainSpec


class StageInputs(BaseModel):
    """A group of arguments of one stage."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=False)


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
