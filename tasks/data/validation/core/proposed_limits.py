"""A contract proposed from a sample: every limit is what was observed and a headroom, and says so.

Limits follow the data they were taken from, so the data pass; what they guard against is the next batch.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import numpy as np

from tasks.data.validation.core.drift import OTHER, Profile, largest_label_share

UNKNOWN_LANGUAGE: Final = "?"  # the language of a text too short to detect it
_QUARANTINE_POINTS: Final = 0.05
_SHARE_POINTS: Final = 0.1
_LENGTH_FACTOR: Final = 1.5
_AROUND: Final = 0.02  # a median may sit between two kinds of rows: its neighbours count too
_LABEL_NATS: Final = 0.1
_ENOUGH_TO_JUDGE: Final = 20
_DOMINANT, _USED = 0.99, 0.01
_NOT_QUARANTINED: Final = {
    "column": {"name": "quarantined"}, "operator": "==", "parameter": 0, "type": "comparison",
}  # fmt: skip


class Seen(NamedTuple):
    """What a sample looks like after repairs and row rules."""

    total: int  # rows in all sources
    rows: int  # rows in the sample
    kept: int
    languages: list[str]  # that answers may be in; empty if no one or two hold nearly all
    known_answers: int  # answers in the sample whose language is known
    in_others: int  # those of them that the row rule rejects for their language
    lengths: dict[str, np.ndarray]  # characters of every kept row's prompt and completion
    profile: Profile
    most_turns: int
    distinct_rows: float  # distinct row ids as a share of the kept rows
    distinct_answers: float
    duplicates: float  # exact copies as a share of the kept rows


class Proposal(NamedTuple):
    """A limit and where it comes from. `name` is a setting, or an expectation of the suite."""

    name: str
    value: Any
    observed: str
    headroom: str
    why: str


def dominant_languages(counts: Mapping[str, int], answers: int, outside: Callable[[list[str]], int]) -> list[str]:
    """One or two languages that hold 99 % of the answers whose language is known; none if it is known of few.

    `counts`: answers by language, of `answers` in all. `outside` counts the answers that the row rule would reject if only these languages were allowed: it forgives
    translations, and Chinese lists that look Japanese to a language detector.
    """
    ranked = sorted(counts, key=lambda name: (-counts[name], name))
    total = sum(counts.values())
    choices = (sorted(ranked[:most]) for most in (1, 2) if total >= max(_ENOUGH_TO_JUDGE, answers / 2))
    return next((some for some in choices if outside(some) <= (1 - _DOMINANT) * total), [])


def proposed_settings(seen: Seen) -> list[Proposal]:
    """Limits that belong into a preset."""
    rejected = 1 - seen.kept / max(1, seen.rows)
    left = round(seen.total * (1 - rejected))
    found = [
        _proposal(
            seen, "contract.max_quarantine_rate", min(1.0, _up(rejected + _QUARANTINE_POINTS)),
            f"{rejected:.1%} rejected", "observed + 5 points",
        ),
        _proposal(seen, "contract.min_rows", max(1, left // 2), f"{left:,} rows left", "half of them"),
        _proposal(
            seen, "contract.max_duplicate_rate", max(0.5, min(1.0, _up(seen.duplicates + _SHARE_POINTS))),
            f"{seen.duplicates:.1%} exact copies", "observed + 10 points, at least 50 %",
        ),
    ]  # fmt: skip
    return [*found, *_label_settings(seen), *_language_setting(seen)]


def _language_setting(seen: Seen) -> Iterator[Proposal]:
    if seen.languages:
        share = 1 - seen.in_others / max(1, seen.known_answers)
        observed = f"{share:.1%} of {seen.known_answers:,} answers whose language is known"
        yield _proposal(seen, "rules.languages", seen.languages, observed, "one or two that hold 99 %")


def _label_settings(seen: Seen) -> Iterator[Proposal]:
    labels = seen.profile["labels"]
    if not labels:
        return
    share = largest_label_share(seen.profile)
    limit = _up(share + min(_SHARE_POINTS, (1 - share) / 2))
    rule = "observed + 10 points, at most half of what is missing to 100 %"
    yield _proposal(seen, "contract.max_label_share", limit, f"the most frequent label is {share:.1%}", rule)
    # Two samples of n rows from the same K labels diverge by about (K - 1) / n nats.
    chance = max((len(found) - 1) / sum(found.values()) for found in labels.values())
    most = max(len(found) - (OTHER in found) for found in labels.values())
    observed = f"{most} labels, {chance:.3f} nats by chance in as many rows"
    yield _proposal(seen, "contract.max_label_drift", _up(_LABEL_NATS + 2 * chance), observed, "0.1 + twice that")


def proposed_suite(
    default: Mapping[str, Any], seen: Seen, settings: list[Proposal], name: str
) -> tuple[dict[str, Any], list[Proposal]]:
    """The default suite with the limits of this data, and what only the suite can say."""
    suite = copy.deepcopy(dict(default))
    suite["name"] = name
    origin = f"Proposed by `tunegate init` from {seen.rows:,} of {seen.total:,} rows; every limit is yours to change."
    suite["meta"] = {"about": f"{origin} {default['meta']['about']}"}
    for item in suite["expectations"]:
        for setting in settings:
            if {"$PARAMETER": setting.name.partition(".")[2]} in item["kwargs"].values():
                item["meta"]["why"] += f"; {setting.why}"
    found = [*_relaxed(suite["expectations"], seen), *_added(suite["expectations"], seen)]
    return suite, found


def _relaxed(expectations: list[dict[str, Any]], seen: Seen) -> Iterator[Proposal]:
    """Shares of distinct values that this data would not reach."""
    rules = {"row_id": (seen.distinct_rows, 2, "half of it"), "answer_hash": (seen.distinct_answers, 10, "a tenth")}
    for item in expectations:
        column, low = item["kwargs"].get("column"), item["kwargs"].get("min_value")
        if item["type"] != "expect_column_proportion_of_unique_values_to_be_between" or column not in rules:
            continue
        share, divisor, words = rules[column]
        if seen.kept and share < low:
            limit = round(share / divisor, 6)
            proposal = _proposal(seen, f"{item['type']}({column})", limit, f"{share:.1%} distinct", words)
            item["kwargs"]["min_value"] = limit
            item["meta"]["why"] += f"; {proposal.why}"
            yield proposal


def _added(expectations: list[dict[str, Any]], seen: Seen) -> Iterator[Proposal]:
    if not seen.kept:
        return
    for proposal, kwargs, why, act in (*_lengths(seen), *_languages(seen), _turns(seen)):
        expectations.append(
            {
                "type": proposal.name.partition("(")[0],
                "kwargs": {**kwargs, "row_condition": _NOT_QUARANTINED},
                "severity": "warning",
                "meta": {"why": f"{why}; {proposal.why}", "act": act},
            }
        )
        yield proposal


_Added = tuple[Proposal, dict[str, Any], str, str]


def _lengths(seen: Seen) -> Iterator[_Added]:
    """The median, and a length that few rows may pass. (GX 1.24 cannot store results of its quantile expectation.)"""
    why, act = "texts of another length may be of another kind", "look at some new rows"
    for column, values in seen.lengths.items():
        low = np.quantile(values, 0.5 - _AROUND, method="lower")
        high = np.quantile(values, 0.5 + _AROUND, method="higher")
        limits = {"min_value": math.floor(low / _LENGTH_FACTOR), "max_value": math.ceil(high * _LENGTH_FACTOR)}
        name, rule = f"expect_column_median_to_be_between({column})", "1.5 times shorter or longer"
        limit = f"{limits['min_value']} to {limits['max_value']}"
        yield (
            _proposal(seen, name, limit, f"{np.median(values):.0f} characters", rule),
            {"column": column, **limits},
            why,
            act,
        )

        longest = float(np.quantile(values, 0.95, method="higher"))
        most, mostly = math.ceil(longest * _LENGTH_FACTOR), 0.9
        name, rule = f"expect_column_values_to_be_between({column})", "1.5 times longer, for 90 %"
        proposal = _proposal(seen, name, f"90 % up to {most}", f"95 % up to {longest:.0f} characters", rule)
        yield proposal, {"column": column, "max_value": most, "mostly": mostly}, why, act


def _languages(seen: Seen) -> Iterator[_Added]:
    counts = seen.profile["counts"]["language"]
    known = (name for name, count in counts.items() if count >= _USED * seen.kept and name != UNKNOWN_LANGUAGE)
    used = seen.languages or sorted(known)
    if sum(count for name, count in counts.items() if name != UNKNOWN_LANGUAGE) < _ENOUGH_TO_JUDGE or not used:
        return
    allowed = [*used, UNKNOWN_LANGUAGE]
    share = sum(counts.get(name, 0) for name in allowed) / seen.kept
    mostly = math.floor(max(0.0, share - _QUARANTINE_POINTS) * 1000) / 1000
    name = "expect_column_values_to_be_in_set(language)"
    observed = f"{share:.1%} in {', '.join(used)} or too short to detect"
    proposal = _proposal(seen, name, f"{', '.join(used)}: at least {mostly:.1%}", observed, "observed - 5 points")
    kwargs = {"column": "language", "value_set": allowed, "mostly": mostly}
    yield (
        proposal,
        kwargs,
        "rows in other languages than before",
        "look at which source they come from; see rules.languages",
    )


def _turns(seen: Seen) -> _Added:
    limit = seen.most_turns if seen.most_turns == 2 else 2 * seen.most_turns
    rule = "observed" if seen.most_turns == 2 else "twice the observed"
    proposal = _proposal(seen, "expect_column_max_to_be_between(turns)", limit, f"{seen.most_turns} at most", rule)
    kwargs = {"column": "turns", "max_value": limit}
    return (
        proposal,
        kwargs,
        "longer conversations than before",
        "check the format of the source; raise the limit if meant",
    )


def _proposal(seen: Seen, name: str, value: Any, observed: str, headroom: str) -> Proposal:
    rows = f"{seen.rows:,}" if seen.rows == seen.total else f"{seen.rows:,} of {seen.total:,}"
    return Proposal(
        name, value, observed, headroom, f"proposed from {rows} rows: observed {observed}, limit = {headroom}"
    )


def _up(value: float) -> float:
    """Rounded up to a thousandth."""
    return math.ceil(round(value * 1000, 6)) / 1000
