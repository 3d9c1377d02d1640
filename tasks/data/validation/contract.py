"""The batch contract: a Great Expectations suite runs on a frame, and no expectation passes by not being evaluated."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final, NamedTuple

import pandas as pd

from data_contracts.errors import ConfigError, Problem

_SUITES: Final = Path(__file__).parents[3] / "data_contracts" / "suites"
# For each suite the budgets it must use: one that forgets a budget would switch it off without a word.
_BUDGETS: Final = {"rows": ("max_quarantine_rate", "min_rows"), "batch": ("max_duplicate_rate",)}
_SETTINGS: Final = {"rows": "suite", "batch": "batch_suite"}
Suites = dict[str, dict[str, Any]]


class ExpectationResult(NamedTuple):
    """One expectation's result. `error` is set if it could not be evaluated; that counts as failed."""

    name: str  # expectation(column)
    severity: str
    success: bool
    observed: float | str | None
    limit: str
    why: str
    act: str
    error: str | None
    suite: str  # the setting that names it
    failing_rows: list[str]  # ids of all rows that fail, where single rows are checked


def load_suites(rows: str, batch: str) -> Suites:
    """The suite of the rows and the suite of the batch as a whole, by name or path."""
    return {"rows": load_suite(rows, "rows"), "batch": load_suite(batch, "batch")}


def load_suite(name: str, subject: str = "rows") -> dict[str, Any]:
    """A suite by its name in data_contracts/suites/ or by path. Raises ConfigError if it is missing or no suite."""
    setting = f"contract.{_SETTINGS[subject]}"
    path = _SUITES / f"{name}.json" if (_SUITES / f"{name}.json").exists() else Path(name)
    known = ", ".join(sorted(file.stem for file in _SUITES.glob("*.json")))
    try:
        text = path.read_text(encoding="utf-8")
        suite = json.loads(text)
        expectations = suite["expectations"]
    except OSError as error:
        raise ConfigError(Problem(f"no such suite: {name}", setting, f"{known}, or a path")) from error
    except (ValueError, KeyError, TypeError) as error:
        act = 'a JSON object with "name" and a list "expectations"'
        raise ConfigError(Problem(f"not an expectation suite: {error!r}", str(path), act)) from error
    used = json.dumps(expectations)
    unused = [budget for budget in _BUDGETS[subject] if f'{{"$PARAMETER": "{budget}"}}' not in used]
    if unused:
        act = f'use {{"$PARAMETER": NAME}} as in instruction_{subject}.json'
        raise ConfigError(Problem(f"the suite does not use {' and '.join(unused)}", str(path), act=act))
    return dict(suite)


def run_suites(
    suites: Suites, frames: dict[str, pd.DataFrame], parameters: dict[str, Any], docs: Path
) -> list[ExpectationResult]:
    """Evaluate every expectation on its frame and write Data Docs (HTML, without the rows' values) to `docs`.

    The import costs seconds, so it happens here. Raises ConfigError if a suite holds something unknown.
    """
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    outcomes: list[ExpectationResult] = []
    with tempfile.TemporaryDirectory() as root:
        context = gx.get_context(mode="file", project_root_dir=root)
        context.variables.progress_bars = ProgressBarsConfig(globally=False)
        for subject, suite in suites.items():
            found = _run(context, subject, suite, frames[subject], parameters)
            if len(found) != len(suite["expectations"]):
                what = f"{len(suite['expectations'])} expectations, {len(found)} results"
                act = "remove expectations that stand twice"
                raise ConfigError(Problem(what, f"contract.{_SETTINGS[subject]}", act=act))
            outcomes += found
        shutil.copytree(Path(root, "gx/uncommitted/data_docs/local_site"), docs)
    return outcomes


def _run(
    context: Any, subject: str, suite: dict[str, Any], frame: pd.DataFrame, parameters: dict[str, Any]
) -> list[ExpectationResult]:
    import great_expectations as gx
    from great_expectations.checkpoint.actions import UpdateDataDocsAction

    asset = context.data_sources.add_pandas(subject).add_dataframe_asset(subject)
    definition = gx.ValidationDefinition(
        name=suite["name"],
        data=asset.add_batch_definition_whole_dataframe("all"),
        suite=context.suites.add(
            gx.ExpectationSuite(name=suite["name"], expectations=_expectations(suite, _SETTINGS[subject]))
        ),
    )
    ids = {"unexpected_index_column_names": ["row_id"]} if "row_id" in frame else {}
    checkpoint = gx.Checkpoint(
        name=suite["name"],
        validation_definitions=[context.validation_definitions.add(definition)],
        actions=[UpdateDataDocsAction(name="docs")],
        result_format={"result_format": "COMPLETE", "exclude_unexpected_values": True, **ids},
    )
    # A frame index with repeated labels makes GX a hundred times slower.
    batch = {"dataframe": frame.reset_index(drop=True)}
    result = context.checkpoints.add(checkpoint).run(batch_parameters=batch, expectation_parameters=parameters)
    (validation,) = result.run_results.values()
    found = [_outcome(item, _SETTINGS[subject]) for item in validation.to_json_dict()["results"]]
    return sorted(found, key=lambda item: (item.name, item.limit))


def _expectations(suite: dict[str, Any], setting: str) -> list[Any]:
    """The suite's expectations, built one by one: given as dicts, GX logs an invalid one and leaves it out."""
    from great_expectations.exceptions.exceptions import GreatExpectationsError
    from great_expectations.expectations.expectation_configuration import ExpectationConfiguration

    try:
        return [ExpectationConfiguration(**item).to_domain_obj() for item in suite["expectations"]]
    except (GreatExpectationsError, KeyError, TypeError, ValueError) as error:
        act = "compare with data_contracts/suites/instruction_rows.json"
        raise ConfigError(Problem(f"unusable expectation: {error}", f"contract.{setting}", act=act)) from error


def _outcome(item: dict[str, Any], suite: str) -> ExpectationResult:
    config, result = item["expectation_config"], item["result"]
    column = config["kwargs"].get("column")
    error = _error(item["exception_info"]) or (None if result else "it gave no result")
    # The share of failing rows where single values are checked, the aggregate otherwise.
    observed = result.get("observed_value")
    if observed is None and "unexpected_percent" in result:
        observed = f"{result['unexpected_count']} of {result['element_count']} rows fail"
    return ExpectationResult(
        name=f"{config['type']}({column or 'rows'})",
        severity=config["severity"],
        success=bool(item["success"]) and error is None,
        observed=observed,
        limit=_limit(config["kwargs"]),
        why=config["meta"].get("why", ""),
        act=config["meta"].get("act", ""),
        error=error,
        suite=suite,
        failing_rows=_failing_rows(result.get("unexpected_index_list") or []),
    )


def _limit(kwargs: dict[str, Any]) -> str:
    """The limits of an expectation in words."""
    bounds = ("min_value", "max_value", "value_set", "mostly")
    return ", ".join(f"{key} {kwargs[key]}" for key in bounds if key in kwargs)


def _failing_rows(entries: list[dict[str, Any]]) -> list[str]:
    """Row ids; GX gives one entry a row, or one with all ids where values are left out."""
    found = [entry["row_id"] for entry in entries if "row_id" in entry]
    return [str(i) for ids in found for i in (ids if isinstance(ids, list) else [ids])]


def _error(info: dict[str, Any]) -> str | None:
    """The first exception's message; GX nests one entry a metric when metrics failed."""
    entries = [info] if "raised_exception" in info else list(info.values())
    return next((str(e["exception_message"]).strip() for e in entries if e["raised_exception"]), None)
