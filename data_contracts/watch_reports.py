"""What a look at the sources found, and whether a retrain is due."""

from data_contracts.data_reports import Report


class Look(Report):
    """What a look at the sources found, against the rows that the last finished run had."""

    snapshot_id: str
    new_rows: int  # never seen before, or changed
    known_rows: int  # in all finished runs together
    drift: dict[str, float]  # of the new rows to the last finished run's, see tasks.data.validation.core.drift
    drifted: list[str]  # those above their limit, worst first


class Watched(Report):
    """Whether a retrain is due, why or why not, and the run that was started for it."""

    due: bool
    why: str
    look: Look | None  # None: the sources are still being written
    run: str | None = None  # name of the flow run at work on it
