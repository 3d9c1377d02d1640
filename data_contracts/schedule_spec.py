"""The dials of a pipeline that runs by itself: when it looks, what is reason enough to retrain, whom it tells."""

from typing import Annotated, Literal
from zoneinfo import ZoneInfo

from pydantic import Field, model_validator

from data_contracts.data_spec import Fraction, Section


class ScheduleSpec(Section):
    cron: str | None = None
    """When to retrain whatever `watch` finds: five cron fields, such as "0 3 * * *"; null: only for a reason."""
    timezone: str = "UTC"
    """Time zone of `cron` (IANA name), such as Europe/Berlin."""
    watch_minutes: Annotated[int, Field(ge=1)] | None = 5
    """Minutes between two looks for fresh data while `tunegate up` runs; null never looks."""
    quiet_seconds: Annotated[float, Field(ge=0.0)] = 30.0
    """How long a source file must not have changed before it is read: one that is still being written waits."""
    min_new_rows: Annotated[int, Field(ge=1)] = 1
    """Fewest rows never seen before, or changed, that start a retrain."""
    min_new_share: Fraction = 0.05
    """Smallest share of the rows known so far that the new ones must make; both limits must be reached."""
    drift_window: Annotated[int, Field(ge=1)] = 5
    """Looks that found new rows whose drift is remembered (M of the next dial)."""
    drift_needed: Annotated[int, Field(ge=1)] | None = 3
    """How many of the last M looks must find the new rows drifted, by the contract's limits, to start a retrain though
    they are few; null never does."""
    max_champion_days: Annotated[float, Field(gt=0.0)] | None = None
    """Days after which a champion is too old: then one new row is enough; null: it never is. Without any new row a
    retrain would make the same model again."""
    when_busy: Literal["wait", "skip"] = "wait"
    """What a retrain does while another one works in the same store: wait for its end, or end as Skipped."""
    notify: list[str] = []
    """Prefect notification blocks told of start, verdict and failure, as TYPE/NAME: slack-webhook/team. Their secrets lie
    in Prefect, never here."""

    @model_validator(mode="after")
    def _dials_fit_together(self) -> "ScheduleSpec":
        found = []
        if self.cron is not None and len(self.cron.split()) != 5:
            found.append(f"cron: {self.cron!r} has not five fields: minute hour day month weekday")
        if self.drift_needed is not None and self.drift_needed > self.drift_window:
            found.append(f"drift_needed: {self.drift_needed} of the last {self.drift_window} looks cannot be")
        try:
            ZoneInfo(self.timezone)
        except (KeyError, ValueError, OSError):
            found.append(f"timezone: no zone {self.timezone!r} is known; Europe/Berlin is one")
        found += [f"notify: {name!r} is not TYPE/NAME" for name in self.notify if len(name.split("/")) != 2]
        if found:
            raise ValueError("\n".join(found))
        return self
