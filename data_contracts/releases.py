"""What moves the champion: a judgement that is kept with its version, and the entries of the promotion ledger."""

from typing import Annotated, Literal

from pydantic import AliasChoices, Field

from data_contracts.data_reports import Note, Report
from data_contracts.reports import ModelVersion, ReleaseCheck, SampleAnswer
from data_contracts.verdict import Decision, Estimate, Verdict

OVERRIDE_TAG = "tunegate.override"  # of a version: why it became champion against what said no
JUDGED_TAG = "tunegate.gate.verdict"  # of a version: the verdict of the newest `tunegate gate` of it
MOVE_TAG = "tunegate.move."  # of a registered model, followed by the time and the move's id: the whole move as JSON

Act = Literal["promote", "rollback"]


class KeptDecision(Report):
    """What `tunegate gate` said of a version, as it is kept with the run that made the version."""

    decision: Decision
    adapter_sha256: str
    # Of the version it was compared with; None: of none. The second name is that of judgements kept before 0.2.
    champion_adapter_sha256: Annotated[
        str | None, Field(validation_alias=AliasChoices("champion_adapter_sha256", "rival_adapter_sha256"))
    ]
    answers: list[SampleAnswer]
    precision: str | None
    unix_seconds: float


class Evidence(Report):
    """What spoke for a version when it became champion. sha256: of the gate report's file."""

    verdict: Verdict | None  # None: no gate report was kept
    judged_in: str  # the file in the version's evidence or among the artifacts of the MLflow run
    judged_sha256: str | None
    adapter_sha256: str
    lineage_sha256: str | None
    mlflow_run_id: str
    check: ReleaseCheck | None  # None: it was not checked


class Move(Report):
    """One move of the alias `champion`. overrode: what said no, and was overruled."""

    id: str
    name: str
    act: Act
    before: str | None
    to: str
    who: str
    run: str | None  # Prefect's name of the flow run
    unix_seconds: float
    why: str
    overrode: list[str]
    evidence: Evidence | None  # None: from before evidence was kept


class Moved(Report):
    """The end of a request to move the champion. move is None if the version was champion already."""

    model: ModelVersion
    move: Move | None


Step = Literal["intended", "done", "undone"]


class Line(Report):
    """One line of the promotion ledger: a move that is about to be made, or how it ended."""

    after: str  # sha256 of the line before; of nothing for the first
    step: Step
    id: str
    unix_seconds: float
    note: Note  # what had to be set right
    move: Move | None  # None: it was written when the move was intended


class MoveEntry(Report):
    """A move and its last step; "intended": it is unfinished. elsewhere: the registry has it and this store's ledger has not."""

    move: Move
    step: Step
    note: Note = ""
    elsewhere: bool = False


class History(Report):
    """Every move of a model's champion, oldest first, and what is wrong with the record of them."""

    name: str
    champion: str | None
    entries: list[MoveEntry]
    unfinished: list[str]  # moves that a killed process left; the next promote, rollback or retrain ends them
    problems: list[str]


class ShadowAnswer(Report):
    """An answer. tokens: the stop token too; seconds: of writing, not of waiting; stopped: ended with a stop token."""

    version: str
    answer: str
    tokens: int
    seconds: float
    stopped: bool


class Pair(Report):
    """A line of the shadow's file; texts are masked."""

    unix_seconds: float
    messages: list[dict[str, str]]
    champion: ShadowAnswer
    challenger: ShadowAnswer


class Side(Report):
    version: str
    tokens: float  # mean
    ms_per_token: float  # median over answers
    stopped: Estimate


class Difference(Report):
    """A question that both answer differently."""

    question: str
    champion: str
    challenger: str
    rouge_l: float


class ShadowReport(Report):
    """One pair of versions. same: share of answers alike but for white space; rouge_l: mean nearness, 1 is alike."""

    prompts: int
    since_unix_seconds: float
    until_unix_seconds: float
    champion: Side
    challenger: Side
    same: Estimate
    rouge_l: float
    most_different: list[Difference]
    other_pairs: int  # of versions that were compared before
