"""The batch contract: a Great Expectations suite runs on a frame, and no expectation passes by not being evaluated."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final, NamedTuple

import pandas as pd

from data_contracts.errors import ConfigError, Problem

_SUITES: Final = Path(__file__).parent.parent / "data_contracts" / "suites"
_BUDGETS: Final = ("max_quarantine_rate", "min_rows")


class Outcome(NamedTuple):
    """One expectation's result. `error` is set if it could not be evaluated; that counts as failed."""

    name: str  # expectation(column)
    severity: str
    success: bool
    observed: float | str | None
    limit: str
    why: str
    act: str
    error: str | None


def load_suite(name: str) -> dict[str, Any]:
    """A suite by its name in data_contracts/suites/ or by path. Raises ConfigError if it is missing or no suite."""
    path = _SUITES / f"{name}.json" if (_SUITES / f"{name}.json").exists() else Path(name)
    known = ", ".join(sorted(file.stem for file in _SUITES.glob("*.json")))
    try:
        text = path.read_text(encoding="utf-8")
        suite = json.loads(text)
        expectations = suite["expectations"]
    except OSError as error:
        raise ConfigError(Problem(f"no such suite: {name}", "contract.suite", f"{known}, or a path")) from error
    except (ValueError, KeyError, TypeError) as error:
        act = 'a JSON object with "name" and a list "expectations"'
        raise ConfigError(Problem(f"not an expectation suite: {error!r}", str(path), act)) from error
    # A suite that forgets a budget would switch it off without a word.
    unused = [budget for budget in _BUDGETS if f'{{"$PARAMETER": "{budget}"}}' not in json.dumps(expectations)]
    if unused:
        act = 'use {"$PARAMETER": NAME} as in instruction_rows.json'
        raise ConfigError(Problem(f"the suite does not use {' and '.join(unused)}", str(path), act=act))
    return dict(suite)


def run_suite(suite: dict[str, Any], frame: pd.DataFrame, parameters: dict[str, float], docs: Path) -> list[Outcome]:
    """Evaluate every expectation on the frame and write Data Docs (HTML, without the rows' values) to `docs`.

    The import costs seconds, so it happens here. Raises ConfigError if the suite holds something unknown.
    """
    import great_expectations as gx
    from great_expectations.checkpoint.actions import UpdateDataDocsAction
    from great_expectations.data_context.types.base import ProgressBarsConfig

    with tempfile.TemporaryDirectory() as root:
        context = gx.get_context(mode="file", project_root_dir=root)
        context.variables.progress_bars = ProgressBarsConfig(globally=False)
        asset = context.data_sources.add_pandas("rows").add_dataframe_asset("rows")
        definition = gx.ValidationDefinition(
            name=suite["name"],
            data=asset.add_batch_definition_whole_dataframe("all"),
            suite=context.suites.add(gx.ExpectationSuite(name=suite["name"], expectations=_expectations(suite))),
        )
        checkpoint = gx.Checkpoint(
            name=suite["name"],
            validation_definitions=[context.validation_definitions.add(definition)],
            actions=[UpdateDataDocsAction(name="docs")],
            result_format={"result_format": "BASIC", "exclude_unexpected_values": True},
        )
        # A frame index with repeated labels makes GX a hundred times slower.
        batch = {"dataframe": frame.reset_index(drop=True)}
        result = context.checkpoints.add(checkpoint).run(batch_parameters=batch, expectation_parameters=parameters)
        shutil.copytree(Path(root, "gx/uncommitted/data_docs/local_site"), docs)
    (validation,) = result.run_results.values()
    outcomes = sorted(map(_outcome, validation.to_json_dict()["results"]), key=lambda item: (item.name, item.limit))
    if len(outcomes) != len(suite["expectations"]):
        what = f"{len(suite['expectations'])} expectations, {len(outcomes)} results"
        raise ConfigError(Problem(what, "contract.suite", act="remove expectations that stand twice"))
    return outcomes


def _expectations(suite: dict[str, Any]) -> list[Any]:
    """The suite's expectations, built one by one: given as dicts, GX logs an invalid one and leaves it out."""
    from great_expectations.exceptions.exceptions import GreatExpectationsError
    from great_expectations.expectations.expectation_configuration import ExpectationConfiguration

    try:
        return [ExpectationConfiguration(**item).to_domain_obj() for item in suite["expectations"]]
    except (GreatExpectationsError, KeyError, TypeError, ValueError) as error:
        act = "compare with data_contracts/suites/instruction_rows.json"
        raise ConfigError(Problem(f"unusable expectation: {error}", "contract.suite", act=act)) from error


def _outcome(item: dict[str, Any]) -> Outcome:
    config, result = item["expectation_config"], item["result"]
    column = config["kwargs"].get("column")
    error = _error(item["exception_info"]) or (None if result else "it gave no result")
    # The share of failing rows where single values are checked, the aggregate otherwise.
    observed = result.get("observed_value")
    if observed is None and "unexpected_percent" in result:
        observed = f"{result['unexpected_count']} of {result['element_count']} rows fail"
    bounds = [f"{key} {config['kwargs'][key]}" for key in ("min_value", "max_value") if key in config["kwargs"]]
    return Outcome(
        f"{config['type']}({column or 'rows'})",
        config["severity"],
        bool(item["success"]) and error is None,
        observed,
        ", ".join(bounds),
        config["meta"].get("why", ""),
        config["meta"].get("act", ""),
        error,
    )


def _error(info: dict[str, Any]) -> str | None:
    """The first exception's message; GX nests one entry a metric when metrics failed."""
    entries = [info] if "raised_exception" in info else list(info.values())
    return next((str(e["exception_message"]).strip() for e in entries if e["raised_exception"]), None)
