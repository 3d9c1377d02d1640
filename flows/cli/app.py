"""The `tunegate` command: parses, calls a flow, prints, sets the exit code; nothing else.

Exit codes: 0 good, 1 a gate said no, 2 input or configuration wrong, 3 inconclusive, 4 infrastructure failed,
130 interrupted. Everything heavy is imported inside the command that needs it, so `--help` answers at once.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, TextIO

import typer

from data_contracts.errors import ConfigError, Problem, TunegateError
from flows.cli.data import data_app
from flows.cli.export import export_app
from flows.cli.options import AsJson, Changes, Force, Preset, StoreChanges
from flows.cli.output import (
    INTERRUPTED,
    Outcome,
    error_payload,
    fail,
    fail_unexpectedly,
    interrupted,
    result_stream,
    say,
    stoppable,
    write_json,
)
from flows.cli.prepared import prepared_spec, preset_of
from flows.cli.release import release_app
from flows.cli.reproduce_cli import reproduce_app
from flows.cli.serve import serve_app
from flows.cli.services import services_app

EXIT_CODES = {"pass": 0, "fail": 1, "inconclusive": 3}
USAGE = 2

app = typer.Typer(
    name="tunegate",
    help="Retrain a domain LLM with QLoRA: raw data in, a gated and registered model out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(release_app)
app.add_typer(reproduce_app)
app.add_typer(services_app)
app.add_typer(export_app)
app.add_typer(serve_app)
app.add_typer(data_app, name="data")


@app.command()
def run(
    preset: Preset = None,
    changes: Changes = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run; run and write nothing.")] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> Outcome:
    """Raw data to a gated, registered model. Goes on from where an earlier run stopped."""
    if dry_run:
        from flows.cli.pages.dry_run import plan, show_plan
        from flows.config.load import load_spec

        loaded = load_spec(preset, changes or [])
        return Outcome(plan(loaded), partial(show_plan, loaded))
    spec = prepared_spec(preset, changes)
    from flows.cli.pages.payloads import summary
    from flows.cli.pages.run import show_run
    from flows.retrain import retrain

    report = retrain(spec, force=force)
    if report is None:
        told = "another run is at work in this store: nothing was done (schedule.when_busy is skip)"
        return Outcome({"skipped": told}, lambda console: console.print(told))
    return Outcome(summary(report), partial(show_run, report), EXIT_CODES[report.gate.verdict])


@app.command()
def watch(preset: Preset = None, changes: Changes = None, as_json: AsJson = False) -> Outcome:
    """Look for fresh data and retrain if there is reason enough; else say why not, in seconds."""
    spec = prepared_spec(preset, changes)
    from flows.watch import watch as look

    found = look(spec)
    told = found.model_dump(mode="json")
    run_ = f"started {found.run}" if found.run else "nothing was started"
    return Outcome(told, lambda console: console.print(f"{found.why}\n{run_}", markup=False, soft_wrap=True))


@app.command()
def plan(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="llama-2-7b, a folder, a hub id, a built-in; or a preset. demo if left out."
        ),
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", help="lora, qlora or full; the preset's if left out.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="24GB", help="The card it must fit; exit code 1 if not.")
    ] = None,
    length: Annotated[
        int | None, typer.Option("--length", min=1, help="Tokens of a row; else train.max_tokens.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="Rows of one step; else train.batch_tokens.")
    ] = None,
    changes: Changes = None,
    as_json: AsJson = False,
) -> Outcome:
    """How much memory training takes, part by part, which cards it fits, what to change. Needs no weights."""
    from flows.cli.plan import make_plan, show_plan

    found = make_plan(target, changes or [], method, gpu, length, batch)
    return Outcome(found.payload(), partial(show_plan, found), 0 if found.fits else 1)


@app.command()
def compare(
    run_ids: Annotated[
        list[str] | None, typer.Option("--run", metavar="ID", help="Run id or MLflow run id; repeat it for several.")
    ] = None,
    changes: StoreChanges = None,
    as_json: AsJson = False,
) -> Outcome:
    """The models of a finished run (the newest if none is named), or several runs beside each other."""
    from flows.cli.pages.compare import compared
    from flows.config.load import load_store

    return Outcome(*compared(Path(load_store(changes or []).root), run_ids or []))


@app.command()
def gate(
    model: Annotated[str, typer.Option("--model", metavar="URI", help="models:/NAME/VERSION or models:/NAME@ALIAS.")],
    preset: Preset = None,
    baseline: Annotated[str | None, typer.Option("--baseline", metavar="URI", help="In place of the champion.")] = None,
    report: Annotated[Path | None, typer.Option("--report", metavar="DIR", help="For JSON, Markdown, JUnit.")] = None,
    comment: Annotated[bool, typer.Option("--comment", help="Comment on the pull request of this CI job.")] = False,
    changes: Changes = None,
    as_json: AsJson = False,
) -> Outcome:
    """Evaluate a registered version and decide: the door for CI. Without a preset: as the version was made."""
    from flows.cli.pages.gate_report import make_folder, write_decision

    make_folder(report)
    if preset is None:
        preset = preset_of(model, changes)
    spec = prepared_spec(preset, changes)
    from flows.cli.pages.payloads import decision_summary
    from flows.cli.pages.verdict_tables import show_decision
    from flows.gate import gate as decide

    decision = decide(spec, model, baseline)
    write_decision(decision, report)
    if comment:
        from flows.cli.pages.pull_request import put_comment

        put_comment(decision)
    show = partial(show_decision, decision.gate, decision.comparison)
    return Outcome(decision_summary(decision), show, EXIT_CODES[decision.gate.verdict])


@app.command()
def doctor(changes: StoreChanges = None, as_json: AsJson = False) -> Outcome:
    """What is installed, which device and precision and why, what is missing, how to fix it."""
    from flows.config.load import load_store
    from flows.services.doctor import examine, healthy, payload, show_checks

    checks = examine(load_store(changes or []))
    return Outcome(payload(checks), partial(show_checks, checks), 0 if healthy(checks) else USAGE)


@app.command()
def init(
    file: Annotated[Path, typer.Argument(help="The preset to write, a .yaml file.")],
    data: Annotated[str, typer.Option("--data", metavar="PATH", help="File, glob or folder with your rows.")],
    name: Annotated[
        str | None, typer.Option("--name", help="Name in the registry; the file's name if left out.")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="Base model: a folder, a hub id or a built-in.")] = None,
    changes: Changes = None,
    as_json: AsJson = False,
) -> Outcome:
    """Look at your data and write a preset with every dial annotated, and a data contract that fits them."""
    from flows.cli.init_spec import init as write_preset
    from flows.cli.init_spec import show_look

    look = write_preset(file, data, name, base, changes or [])
    return Outcome(look.payload(), partial(show_look, look))


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
        except Exception as error:  # noqa: BLE001 the last resort: nobody should meet a bare traceback
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
    say(result, stream, as_json)
    if result.then:
        result.then()
    return result.exit_code
