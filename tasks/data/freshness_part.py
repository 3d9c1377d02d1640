"""Is there reason enough to retrain? A rule over counts, so that it can be read, tested and explained."""

from collections.abc import Mapping, Sequence
from typing import Final

from data_contracts.schedule_spec import ScheduleSpec
from data_contracts.watch_reports import Look

_ROWS_TO_JUDGE: Final = 30
"""Distances of fewer rows are mostly chance: of 30 rows from the very same distribution, one in a hundred samples lies
0.3 away or more (Kolmogorov's 1.63 / sqrt(n))."""


def drifted(new_rows: int, drift: Mapping[str, float], max_length_drift: float, max_share_drift: float) -> list[str]:
    """The distances of `tasks.data.validation.core.drift.drift` that lie above their limits, worst first; none if the rows are few.

    Shares of sources do not count: a new file in the inbox is a new source, and that is no drift.
    """
    if new_rows < _ROWS_TO_JUDGE:
        return []
    limits = {name: max_length_drift if name.startswith("ks_") else max_share_drift for name in drift}
    above = {name: drift[name] / limit for name, limit in limits.items() if drift[name] > limit and name != "kl_source"}
    return sorted(above, key=lambda name: -above[name])


def reason_to_retrain(
    look: Look, looks: Sequence[bool], champion_days: float | None, schedule: ScheduleSpec
) -> tuple[bool, str]:
    """Whether a retrain is due, and why or why not.

    looks: whether the new rows had drifted, in every look that found some, oldest first, this one included.
    """
    if not look.known_rows:
        return True, f"no run has finished on these data yet: {look.new_rows:,} rows"
    if not look.new_rows:
        return False, "nothing new since the last finished run"
    share = look.new_rows / look.known_rows
    told = f"{look.new_rows:,} new rows, {share:.1%} of the {look.known_rows:,} known"
    if look.new_rows >= schedule.min_new_rows and share >= schedule.min_new_share:
        return True, told
    window = looks[-schedule.drift_window :]
    if schedule.drift_needed and sum(window) >= schedule.drift_needed:
        worst = ", ".join(f"{name} {look.drift[name]:.2f}" for name in look.drifted)
        return True, f"{told}; drift in {sum(window)} of the last {len(window)} looks ({worst or 'not in this one'})"
    limit = schedule.max_champion_days
    if limit is not None and champion_days is not None and champion_days > limit:
        return True, f"{told}; the champion is {champion_days:.0f} days old, limit {limit:g}"
    return False, f"{told}; a retrain needs {schedule.min_new_rows:,} and {schedule.min_new_share:.1%}"
