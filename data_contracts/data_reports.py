"""What the data stages hand to each other: small manifests (a path and a sha256), never frames.

Paths are relative to the store's root, so a store can be moved. All are frozen pydantic models that Prefect
keeps as JSON.
"""

from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field


class Report(BaseModel):
    # JSON has no infinity: an unbounded interval is written as "Infinity", which pydantic reads back.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


Note = Annotated[str, Field(validation_alias=AliasChoices("note", "told"))]
"""A sentence for people. Reports of version 0.1 have it under an older name."""


class FileRef(Report):
    """A file or folder of the store: its relative path and the sha256 of its content."""

    path: str
    sha256: str


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


class CheckedRows(Report):
    """What rules, drift and contract said of the rows of a snapshot: it stays with them to the end."""

    snapshot_id: str
    rows_in: int
    reasons: dict[str, int]
    flags: dict[str, int]
    repairs: dict[str, Repaired]
    languages: dict[str, int]
    drift: Drift
    contract_result: FileRef
    data_docs: str
    sources: list[SourceFile] = []


class ValidatedData(CheckedRows):
    """Rows that passed the rules, rows in quarantine with their reason, and the batch contract's result.

    `kept` are Parquet parts with the columns row_id, source, line, messages, language.
    """

    kept: list[FileRef]
    quarantine: FileRef
    rows_kept: int
    profile: FileRef


class DatasetManifest(CheckedRows):
    """The splits. rows_in = kept + quarantined + duplicates, and kept = sum of the splits."""

    kept: int
    quarantined: int
    duplicates: int
    exact_duplicates: int
    near_duplicates: int
    splits: dict[str, int]
    known_rows: int
    contamination: dict[str, int]  # train rows taken out, by what they share most of an item with
    train: FileRef
    validation: FileRef
    test: FileRef
    quarantine: FileRef
    duplicate_rows: FileRef


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
    now: dict[str, Any]  # the file that holds it, and its line there
    history: list[list[str | None]]  # snapshot, fate, reason, split
    releases: list[dict[str, Any]]


class SourceCheck(Report):
    """What is new in the sources since the last finished run."""

    snapshot_id: str
    new_rows: int  # never seen before, or changed
    known_rows: int  # in all finished runs together
    drift: dict[str, float]  # of the new rows to the last finished run's, see tasks.data.validation.core.drift
    drifted: list[str]  # those above their limit, worst first


class Watched(Report):
    """Whether a retrain is due, why or why not, and the run that was started for it."""

    due: bool
    why: str
    look: SourceCheck | None  # None: the sources are still being written
    run: str | None = None  # name of the flow run at work on it
