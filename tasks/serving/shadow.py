"""What the shadow has kept of a model, compared."""

from pathlib import Path

from pydantic import ValidationError

from data_contracts.errors import ConfigError, DataError, Problem
from data_contracts.run_spec import StoreSpec
from data_contracts.shadow_reports import Pair, ShadowReport
from tasks.serving.endpoint import shadow_file
from tasks.serving.shadow_pairs import compare_pairs


def compare_shadow(store: StoreSpec, name: str) -> tuple[ShadowReport, Path]:
    """The newest pair of versions, and the file it was read from. Raises ConfigError if nothing was kept."""
    file = shadow_file(store, name)
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    if not lines:
        act = f"tunegate serve {name}@champion --shadow {name}@challenger, and ask it"
        raise ConfigError(Problem(f"no question to {name} was answered in the shadow yet", str(file), act=act))
    return compare_pairs([_pair(line, place, file) for place, line in enumerate(lines, 1)]), file


def _pair(line: str, place: int, file: Path) -> Pair:
    try:
        return Pair.model_validate_json(line)
    except ValidationError as error:
        what = f"line {place} is not one that the shadow wrote: {error.errors()[0]['msg']}"
        raise DataError(Problem(what, str(file), act="remove the line")) from error
