"""A comparison in sentences: the same in the terminal and in the report."""

from collections.abc import Iterator

from data_contracts.reports import Start
from data_contracts.verdict import Comparison, Estimate, Interval

_LABELS = {"lora": "LoRA", "qlora": "QLoRA"}
_FORMS = {"full": "on the full-precision base", "merged": "merged into 16-bit weights"}
_NONE = "-"


def label_of(name: str) -> str:
    return _LABELS.get(name, name)


def number(value: float | None, form: str = ".3f") -> str:
    return _NONE if value is None else format(value, form)


def interval(found: Interval | None, form: str = ".3f") -> str:
    return "" if found is None else f"[{found[0]:{form}}, {found[1]:{form}}]"


def estimate(found: Estimate, form: str = ".3f") -> str:
    return f"{found.value:{form}} {interval(found.interval, form)}"


def start_sentence(start: Start) -> str:
    """Where an arm's training began, after the arm's name."""
    if start.version is None:
        return f"starts from scratch on {start.new_rows:,} rows: {start.note}"
    replayed = f"{start.replayed_rows:,} of {start.old_rows:,} old ones"
    return f"resumes from {start.note}, on {start.new_rows:,} new rows and {replayed}"


def sentences(found: Comparison) -> Iterator[str]:
    """The comparison in words, one difference a line."""
    for name, gain in found.gains.items():
        yield f"{label_of(name)} lowers held-out loss against base by {estimate(gain)} nats/token"
    own = label_of(found.candidate)
    if found.champion_gain:
        yield f"{own} lowers held-out loss against champion by {estimate(found.champion_gain)} nats/token"
    for name, change in found.accuracy_gains.items():
        yield f"{label_of(name)} changes accuracy against base by {estimate(change, '+.3f')}"
    if found.retention:
        yield f"{own} keeps {estimate(found.retention, '.1%')} of LoRA's loss gain"
    if found.accuracy_drop:
        yield f"accuracy lost to LoRA: {estimate(found.accuracy_drop, '+.3f')}"
    if found.flips:
        flips = found.flips
        yield (
            f"answers that flip between LoRA and {own}: {flips.rate:.1%} ({flips.lost} lost, {flips.won} won; "
            f"exact McNemar p {p_value(flips.p)})"
        )
    for form, loss in found.forms.items():
        yield f"served {_FORMS.get(form, form)}, its loss changes by {estimate(loss, '+.4f')} nats/token"
    if found.weights_saving is not None:
        yield f"memory of the base weights saved: {found.weights_saving:.1%}"
    if found.memory_saving:
        yield f"peak memory saved: {found.memory_saving.value:.1%}"
    if found.speed_ratio:
        yield f"QLoRA trains at {estimate(found.speed_ratio, '.2f')} x LoRA's speed"


def p_value(value: float | None) -> str:
    return _NONE if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"
