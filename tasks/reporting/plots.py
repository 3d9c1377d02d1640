"""The plots of a run, each a matplotlib figure: the report has them as SVG, MLflow's parent run as pictures.

matplotlib takes a second to import, so it is imported in the function that draws.
"""

import io
from collections.abc import Sequence
from typing import Any

from data_contracts.reports import TrainReport
from data_contracts.verdict import Comparison, Estimate
from tasks.reporting.tables import PARTS, memory_parts

_COLOURS = {"lora": "#0969da", "qlora": "#bf3989", "full": "#1a7f37", "prefix": "#9a6700"}
_OTHERS = ("#8250df", "#cf222e", "#0550ae", "#116329", "#953800")
_GREY = "#6e7781"
_PART_COLOURS = {
    "process": "#d0d7de", "weights": "#57606a", "adapters": "#0969da", "optimiser": "#9a6700", "gradients": "#cf222e",
    "activations": "#2da44e", "logits": "#8250df", "rest": "#8ddb8c",
}  # fmt: skip


def figures(arms: Sequence[TrainReport], found: Comparison) -> dict[str, Any]:
    """All plots that this run has numbers for, by name."""
    drawn = {
        "losses": losses_plot(arms),
        "quality": quality_plot(found),
        "memory": memory_plot(arms),
        "speed": speed_plot(arms),
    }
    if found.slices:
        drawn["slices"] = slices_plot(found)
    return drawn


def svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def losses_plot(arms: Sequence[TrainReport]) -> Any:
    """Training loss of every training over the steps; an arm's seeds share a colour."""
    figure, axes = _axes(3.0)
    for arm in arms:
        first = next(other for other in arms if other.arm == arm.arm) is arm
        steps, values = [point.step for point in arm.loss], [point.loss_nats for point in arm.loss]
        width = 1.5 if first else 0.7
        axes.plot(steps, values, label=arm.arm if first else None, color=_colour(arm.arm, arms), lw=width)
    axes.set(xlabel="optimiser step", ylabel="training loss, nats/token", title="Training loss")
    axes.legend(frameon=False)
    return figure


def quality_plot(found: Comparison) -> Any:
    """How much lower than the base's each arm's held-out loss is, with its interval."""
    return _forest(found.gains, "held-out loss below the base's, nats/token", "Gain over the base")


def slices_plot(found: Comparison) -> Any:
    gains = {f"{item.kind}: {item.name} ({item.items})": item.gain for item in found.slices}
    title = f"Gain of {found.released} over the base, by slice"
    return _forest(gains, "held-out loss below the base's, nats/token", title)


def memory_plot(arms: Sequence[TrainReport]) -> Any:
    """The peak of each training by part, as measured and as planned."""
    bars = {f"{arm.name}, {kind}": parts for arm in arms for kind, parts in memory_parts(arm).items()}
    figure, axes = _axes(1.8 + 0.35 * len(bars))
    left = dict.fromkeys(bars, 0.0)
    for part, label in PARTS.items():
        widths = [bars[name].get(part, 0) / 1e9 for name in bars]
        axes.barh(list(bars), widths, left=list(left.values()), color=_PART_COLOURS[part], label=label)
        left = {name: start + width for (name, start), width in zip(left.items(), widths, strict=True)}
    axes.invert_yaxis()
    axes.set(xlabel="GB at the peak of training", title="Memory")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return figure


def speed_plot(arms: Sequence[TrainReport]) -> Any:
    figure, axes = _axes(0.9 + 0.45 * len(arms))
    rates = [arm.useful_tokens_per_s for arm in arms]
    axes.barh([arm.name for arm in arms], rates, color=[_colour(arm.arm, arms) for arm in arms], alpha=0.8)
    axes.invert_yaxis()
    axes.set(xlabel="tokens per second, padding not counted", title="Training speed")
    return figure


def _forest(gains: dict[str, Estimate], label: str, title: str) -> Any:
    figure, axes = _axes(1.0 + 0.32 * len(gains))
    for row, (name, gain) in enumerate(gains.items()):
        bars = [[max(0.0, gain.value - gain.low)], [max(0.0, gain.high - gain.value)]]
        axes.errorbar([gain.value], [row], xerr=bars, fmt="o", capsize=4, color=_COLOURS.get(name, _GREY))
    axes.axvline(0, color=_GREY, lw=0.8)
    axes.set_yticks(range(len(gains)), list(gains))
    axes.set_ylim(len(gains) - 0.4, -0.6)
    axes.set(xlabel=label, title=title)
    return figure


def _axes(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _colour(arm: str, arms: Sequence[TrainReport]) -> str:
    others = [name for name in dict.fromkeys(item.arm for item in arms) if name not in _COLOURS]
    return _COLOURS.get(arm) or _OTHERS[others.index(arm) % len(_OTHERS)]
