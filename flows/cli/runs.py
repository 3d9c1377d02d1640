"""`tunegate run`, `watch`, `plan`, `compare`, `gate`, `init`: from a preset to a verdict."""

import time
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import AsJson, Changes, Details, Force, Preset, StoreChanges, prepared_spec, preset_of
from flows.cli.output import EXIT_CODES, Outcome

runs_app = typer.Typer()


@runs_app.command("run")
def run_command(
    preset: Preset = None,
    changes: Changes = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run; run and write nothing.")] = False,
    force: Force = False,
    details: Details = False,
    as_json: AsJson = False,
) -> Outcome:
    """Raw data to a gated, registered model. Resumes where an earlier run stopped."""
    if dry_run:
        from flows.cli.pages.dry_run import planned_run, show_dry_run
        from flows.config.load import load_spec

        loaded = load_spec(preset, changes or [])
        return Outcome(planned_run(loaded), partial(show_dry_run, loaded))
    spec = prepared_spec(preset, changes)
    from flows.cli.pages.payloads import summary
    from flows.cli.pages.verdict import show_run
    from flows.retrain import retrain

    began = time.monotonic()
    report = retrain(spec, force=force)
    if report is None:
        reason = "another run uses this store: nothing was run (schedule.when_busy is skip)"
        return Outcome({"skipped": reason}, lambda console: console.print(reason))
    show = partial(show_run, report, details=details, seconds=time.monotonic() - began)
    return Outcome(summary(report), show, EXIT_CODES[report.gate.verdict])


@runs_app.command("watch")
def watch_command(preset: Preset = None, changes: Changes = None, as_json: AsJson = False) -> Outcome:
    """Check for fresh data and retrain if there is reason enough; else say why not, in seconds."""
    spec = prepared_spec(preset, changes)
    from flows.watch import watch

    found = watch(spec)
    lines = f"{found.why}\n{f'started {found.run}' if found.run else 'nothing was started'}"
    return Outcome(found.model_dump(mode="json"), lambda console: console.print(lines, markup=False, soft_wrap=True))


@runs_app.command("plan")
def plan_command(
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
    from flows.cli.pages.plan import make_plan, show_plan

    found = make_plan(target, changes or [], method, gpu, length, batch)
    return Outcome(found.payload(), partial(show_plan, found), 0 if found.fits else 1)


@runs_app.command("compare")
def compare_command(
    run_ids: Annotated[
        list[str] | None, typer.Option("--run", metavar="ID", help="Run id or MLflow run id; repeat it for several.")
    ] = None,
    changes: StoreChanges = None,
    as_json: AsJson = False,
) -> Outcome:
    """The models of a finished run (the newest if none is named), or several runs side by side."""
    from flows.cli.pages.compare import compared
    from flows.config.load import load_store

    return Outcome(*compared(Path(load_store(changes or []).root), run_ids or []))


@runs_app.command("gate")
def gate_command(
    model: Annotated[str, typer.Option("--model", metavar="URI", help="models:/NAME/VERSION or models:/NAME@ALIAS.")],
    preset: Preset = None,
    baseline: Annotated[str | None, typer.Option("--baseline", metavar="URI", help="In place of the champion.")] = None,
    report: Annotated[Path | None, typer.Option("--report", metavar="DIR", help="For JSON, Markdown, JUnit.")] = None,
    comment: Annotated[bool, typer.Option("--comment", help="Comment on the pull request of this CI job.")] = False,
    details: Details = False,
    changes: Changes = None,
    as_json: AsJson = False,
) -> Outcome:
    """Evaluate a registered version and decide, for CI. Without a preset: with the settings that made the version."""
    from flows.cli.pages.gate_report import make_folder, write_decision

    make_folder(report)
    if preset is None:
        preset = preset_of(model, changes)
    spec = prepared_spec(preset, changes, title=model)
    from flows.cli.pages.payloads import decision_summary
    from flows.cli.pages.verdict import show_decision
    from flows.gate import gate

    decision = gate(spec, model, baseline)
    write_decision(decision, report)
    if comment:
        from flows.cli.pages.pull_request import put_comment

        put_comment(decision)
    show = partial(show_decision, decision, spec.store.root, details=details)
    return Outcome(decision_summary(decision), show, EXIT_CODES[decision.gate.verdict])


@runs_app.command("init")
def init_command(
    file: Annotated[Path, typer.Argument(help="The preset to write, a .yaml file.")],
    data: Annotated[str, typer.Option("--data", metavar="PATH", help="File, glob or folder with your rows.")],
    name: Annotated[
        str | None, typer.Option("--name", help="Name in the registry; the file's name if left out.")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="Base model: a folder, a hub id or a built-in.")] = None,
    changes: Changes = None,
    as_json: AsJson = False,
) -> Outcome:
    """Look at your data and write a preset with every setting annotated, and a data contract that fits them."""
    from flows.config.init_spec import show_preset, write_preset

    written = write_preset(file, data, name, base, changes or [])
    return Outcome(written.payload(), partial(show_preset, written))
