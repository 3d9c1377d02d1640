"""Markdown from templates, for pages that others render: every text is escaped, so none forms markup or notifies anybody.

GitHub and GitLab take entities, and nothing else keeps them from reading an @ as a mention. Prefect's page shows an entity
as its source text, and takes backslashes.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from string import punctuation
from typing import TYPE_CHECKING
from urllib.parse import quote

if TYPE_CHECKING:  # `gate` checks its folder before anything slow is imported
    from jinja2 import Environment
    from markupsafe import Markup

    from data_contracts.verdict import Estimate, GateResult, Interval

_TEMPLATES = Path(__file__).parent / "templates"
_NONE = "-"
# What stands for itself in Markdown's running text, whatever is around it.
_SPECIAL = re.compile(r"[^\w .,:;()/%+='?-]|(?<![^\W_])_|_(?![^\W_])")


def escape(text: str) -> str:
    """Text that Markdown and HTML show as it is, on one line. Nobody is notified by an @."""
    line = " ".join(text.split())
    return _SPECIAL.sub(lambda match: "@&#8203;" if match[0] == "@" else f"&#{ord(match[0])};", line)


def backslashed(text: str) -> str:
    """Text that Prefect's Markdown shows as it is, on one line."""
    line = " ".join(text.split())
    return _SPECIAL.sub(lambda match: f"\\{match[0]}" if match[0] in punctuation else match[0], line)


def link(address: str, text: object) -> "Markup":
    """A link of ours: the address is ours too, but may hold a name that somebody chose."""
    from markupsafe import Markup

    return Markup(f"[{backslashed(str(text))}]({quote(address, safe=':/#?&=%+,~')})")


def code(text: object) -> "Markup":
    """As it is, to copy; without the few characters that would end it."""
    from markupsafe import Markup

    return Markup(f"`{re.sub('[`|<>]', '?', ' '.join(str(text).split()))}`")


def environment(escaped: Callable[[str], str], *folders: Path) -> "Environment":
    """Templates of these folders and of ours; everything they print is escaped in this way."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    found = Environment(
        loader=FileSystemLoader([*folders, _TEMPLATES]),
        finalize=lambda value: value if isinstance(value, Markup) else escaped(str(value)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {
        "number": plain_number,
        "interval": plain_interval,
        "estimate": _estimate,
        "needs": needs,
        "link": link,
        "code": code,
    }
    return found


def plain_number(value: float | None) -> str:
    return _NONE if value is None or not math.isfinite(value) else f"{value:.3f}"


def plain_interval(found: "Interval | None") -> str:
    return _NONE if found is None else f"{plain_number(found[0])} to {plain_number(found[1])}"


def _estimate(found: "Estimate | None") -> str:
    return _NONE if found is None else f"{plain_number(found.value)} ({plain_interval(found.interval)})"


def needs(gate: "GateResult") -> str:
    return _NONE if gate.threshold is None else f"{gate.direction} {gate.threshold:g}"
