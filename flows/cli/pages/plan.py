"""`tunegate plan`: what a training step needs, which cards it fits, what to change where it does not."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast, get_args

from rich.table import Table
from rich.text import Text

from data_contracts.errors import ConfigError, Problem
from data_contracts.run_spec import RunSpec
from data_contracts.train_spec import Method
from flows.config.load import load_changes, load_spec, preset_names
from tasks.training.plan import Plan, plan_methods, room_of

if TYPE_CHECKING:
    from rich.console import Console


_METHODS = get_args(Method)
_GIGABYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:gi?b)?\s*", re.IGNORECASE)
_GIB = 2**30
_HOW_FAR_OFF = "published peaks are 5 % off such plans at the median; the worst is 1.24 times its plan; on a CPU 1.31 (docs/planner.md)"
_PARTS = {
    "weights": "base weights",
    "constants": "quantisation constants",
    "adapters": "adapters",
    "gradients": "gradients at the peak",
    "optimiser": "optimiser states",
    "activations": "activations",
    "logits": "logits and their gradients",
}
_TOTALS = {
    "allocated": "tensors (allocated)",
    "reserved": "+ allocator's slack (reserved)",
    "total": "+ CUDA context: on the card",
}


@dataclass(frozen=True)
class PlannedBase:
    """Plans of one base, one for each method."""

    base: str
    parameters: int
    plans: Sequence[Plan]

    @property
    def fits(self) -> bool:
        return all(plan.fits for plan in self.plans)

    def payload(self) -> dict[str, Any]:
        return {"base": self.base, "parameters": self.parameters, "plans": [_payload(plan) for plan in self.plans]}


def make_plan(
    target: str | None, changes: list[str], method: str | None, gpu: str | None, length: int | None, batch: int | None
) -> PlannedBase:
    """target: a preset, a .yaml file, or a base model. Raises ConfigError."""
    spec = _spec(target, changes)
    if method is not None and method not in _METHODS:
        raise ConfigError(Problem(f"no method is called {method!r}", "--method", f"one of {', '.join(_METHODS)}"))
    methods = [cast(Method, method)] if method else spec.train.methods
    arch, plans = plan_methods(spec, methods, length, batch, _gigabytes(gpu))
    return PlannedBase(spec.model.base, arch.parameters, plans)


def _spec(target: str | None, changes: list[str]) -> RunSpec:
    if target is None or target in preset_names() or target.endswith((".yaml", ".yml")):
        return load_spec(target, changes).spec
    return load_changes([f"model.base={target}", *changes])


def _gigabytes(text: str | None) -> float | None:
    if text is None:
        return None
    found = _GIGABYTES.fullmatch(text)
    if not found or float(found[1]) <= 0:
        raise ConfigError(Problem(f"{text!r} is no size of a card", "--gpu", "a number of GB", "--gpu 24GB"))
    return float(found[1])


def _payload(plan: Plan) -> dict[str, Any]:
    parts, settings = plan.parts, asdict(plan.settings)
    stack = settings.pop("stack")
    totals = {"static": parts.static, "allocated": parts.allocated, "reserved": parts.reserved, "total": parts.total}
    return {
        "method": plan.settings.method,
        "settings": settings,
        "software": stack,
        "parts": asdict(parts),
        **{f"{name}_bytes": value for name, value in totals.items()},
        "needed_bytes": plan.needed,
        "cards": [asdict(card) | {"fits": card.fits} for card in plan.cards],
        "gpu": asdict(plan.gpu) | {"fits": plan.gpu.fits} if plan.gpu else None,
        "changes": [asdict(change) for change in plan.changes],
        "alternatives": plan.alternatives,
    }


# --- the page -----------------------------------------------------------------------------------------------


def show_plan(found: PlannedBase, console: "Console") -> None:
    _show_parts(found, console)
    for plan in found.plans:
        _show_cards(plan, console)
    for plan in found.plans:
        if plan.gpu:
            _show_gpu(plan, console)
    console.print(Text(f"\n{_HOW_FAR_OFF}", style="dim"), soft_wrap=True)


def _show_parts(found: PlannedBase, console: "Console") -> None:
    title = f"{found.base}: {found.parameters / 1e9:.2f} billion parameters, peak of one training step"
    console.print(Text(title, style="bold"), soft_wrap=True)
    table = Table()
    table.add_column("GiB")
    for plan in found.plans:
        table.add_column(plan.settings.method, justify="right")
    for name, label in _PARTS.items():
        table.add_row(label, *(_gib(getattr(plan.parts, name)) for plan in found.plans))
    table.add_section()
    for name, label in _TOTALS.items():
        table.add_row(label, *(_gib(getattr(plan.parts, name)) for plan in found.plans))
    console.print(table)
    for plan in found.plans:
        console.print(Text(f"  {plan.settings.method}: {_settings_line(plan)}"), soft_wrap=True)
        for name, more in plan.alternatives.items():
            console.print(Text(f"    {name}: {_gib(more)} GiB more", style="dim"), soft_wrap=True)


def _settings_line(plan: Plan) -> str:
    """The settings that the numbers hold for."""
    made = plan.settings
    rows = "1 row" if made.batch == 1 else f"{made.batch} rows"
    parts = [f"{rows} x {made.length} tokens, all with a loss", f"peak at the {plan.parts.moment}"]
    parts += [f"rank {made.rank} on {made.targets}"] if made.has_lora else []
    parts += [f"{made.prefix_tokens} virtual tokens"] if made.prefix_tokens else []
    parts += [f"4 bits with {'double' if made.double_quant else 'single'} quantisation"] if made.is_quantised else []
    parts += [f"{'bf16' if made.compute_bytes == 2 else 'fp32'}", made.optimiser]
    return ", ".join([*parts, f"checkpointing {'on' if made.checkpointing else 'off'}"])


def _show_cards(plan: Plan, console: "Console") -> None:
    made = plan.settings
    console.print(
        Text(f"\n{made.method}: which cards (tight: less than 10 % stays free)", style="bold"), soft_wrap=True
    )
    table = Table()
    for name in ("card", f"{made.batch} x {made.length} fits", f"most rows of {made.length}", "longest single row"):
        table.add_column(name, overflow="fold")
    for card in plan.cards:
        table.add_row(
            f"{card.gigabytes:g} GB", _fits(card.changes, card.tight), _count(card.most_rows), _count(card.longest_row)
        )
    console.print(table)


def _fits(changes: tuple[str, ...] | None, is_tight: bool) -> Text:
    if changes is None:
        return Text("no", style="red")
    tight = ", tight" if is_tight else ""
    if changes:
        return Text(f"only with {', '.join(changes)}{tight}", style="yellow")
    return Text(f"yes{tight}", style="yellow" if is_tight else "green")


def _count(number: int) -> str:
    return f"{number:,}" if number else "none"


def _show_gpu(plan: Plan, console: "Console") -> None:
    assert plan.gpu is not None  # asked by the caller
    room, style = room_of(plan.gpu.gigabytes), "green" if plan.gpu.fits else "red"
    verdict = ("fits, tight," if plan.gpu.tight else "fits") if plan.gpu.fits else "does not fit"
    line = (
        f"\n{plan.settings.method} {verdict} a {plan.gpu.gigabytes:g} GB card: {_gib(plan.needed)} of {_gib(room)} GiB"
    )
    console.print(Text(line, style=f"bold {style}"), soft_wrap=True)
    for change in plan.changes:
        mark = "fits" if change.total <= room else ""
        text = f"  {change.what:<42} saves {_gib(change.saves):>7}, then {_gib(change.total):>7} GiB  {mark}"
        console.print(Text(text), soft_wrap=True)


def _gib(count: int) -> str:
    return f"{count / _GIB:.2f}"
