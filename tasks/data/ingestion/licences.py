"""The licence of the data, as far as somebody has declared it. Its own file: many cache keys hold it, and few hold sources.py."""

import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, metadata, packages_distributions

from data_contracts.data_spec import DataSpec

UNKNOWN_LICENCE = "unknown"
_STDLIB = "PSF-2.0"


def data_licence(data: DataSpec) -> str:
    """What the preset says; else of the built-in data the packages' own; else "unknown"."""
    if data.licence:
        return data.licence
    if data.source != ["builtin:python-docs"]:
        return UNKNOWN_LICENCE
    return " AND ".join(sorted({package_licence(package) for package in data.packages}))


def package_licence(package: str) -> str:
    """Of an importable package, by the metadata of its distribution."""
    name = package.partition(".")[0]
    if name == "stdlib" or name in sys.stdlib_module_names:
        return _STDLIB
    found = _distributions().get(name)
    return distribution_licence(found[0]) if found else UNKNOWN_LICENCE


@cache
def _distributions() -> Mapping[str, list[str]]:
    """By importable name; a second to find out."""
    return packages_distributions()


def distribution_licence(name: str) -> str:
    """The SPDX expression (PEP 639), or an older field if it is one line; "unknown" if the distribution is not here."""
    try:
        found = metadata(name)
    except PackageNotFoundError:
        return UNKNOWN_LICENCE
    licence = next((found[field] for field in ("License-Expression", "License") if field in found), "")
    return licence if licence and "\n" not in licence else UNKNOWN_LICENCE
