"""The `tunegate` command: parses, calls a flow, prints, sets the exit code; nothing else.

A command function has a parameter for each of its options: typer reads the command line's declaration from them. What it
calls takes at most six.

Exit codes: 0 good, 1 a gate failed, 2 input or configuration wrong, 3 inconclusive, 4 infrastructure failed,
130 interrupted. Everything heavy is imported inside the command that needs it, so `--help` answers at once.
"""

import sys
from typing import Annotated, TextIO

import typer

from data_contracts.errors import ConfigError, Problem, TunegateError
from flows.cli.data import data_app
from flows.cli.export import export_app
from flows.cli.options import AsJson
from flows.cli.output import (
    INTERRUPTED,
    USAGE,
    Outcome,
    error_payload,
    fail,
    fail_unexpectedly,
    interrupted,
    print_outcome,
    result_stream,
    stoppable,
    write_json,
)
from flows.cli.release import release_app
from flows.cli.runs import runs_app
from flows.cli.serve import serve_app
from flows.cli.services import services_app

app = typer.Typer(
    name="tunegate",
    help="Retrain a domain LLM with QLoRA: raw data in, a gated and registered model out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for group in (runs_app, data_app, release_app, export_app, serve_app, services_app):
    app.add_typer(group)


@app.callback(invoke_without_command=True)
def _without_command(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    as_json: AsJson = False,
) -> Outcome | None:
    if context.invoked_subcommand:
        return None
    if not version:
        raise ConfigError(Problem("no command is given", "tunegate", act="tunegate --help lists them"))
    from importlib.metadata import version as installed

    found = installed("tunegate")
    return Outcome({"version": found}, lambda console: console.print(f"tunegate {found}"))


def main(argv: list[str] | None = None) -> int:
    """Run one command; answer with its exit code."""
    args = sys.argv[1:] if argv is None else argv
    as_json = "--json" in args
    with result_stream(as_json) as stream, stoppable(stream, as_json):
        try:
            return _run(args, stream, as_json)
        except KeyboardInterrupt:
            return interrupted(stream, as_json)
        except TunegateError as error:
            return fail(error, stream, as_json)
        except Exception as error:  # noqa: BLE001 the last resort: a user must not see a bare traceback
            return fail_unexpectedly(error, args, stream, as_json)


def _run(args: list[str], stream: TextIO, as_json: bool) -> int:
    try:
        result = app(args, prog_name="tunegate", standalone_mode=False)
    except Exception as error:
        # A wrong option or argument. typer carries its own copy of click, whose classes it does not export.
        if not (hasattr(error, "show") and hasattr(error, "format_message")):
            raise
        error.show(file=sys.stderr)
        if as_json:
            write_json(error_payload("UsageError", [Problem(error.format_message())], USAGE), stream)
        return USAGE
    if not isinstance(result, Outcome):
        return interrupted(stream, as_json) if result == INTERRUPTED else int(result or 0)
    print_outcome(result, stream, as_json)
    if result.then:
        result.then()
    return result.exit_code
