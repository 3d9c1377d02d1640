"""`tunegate data`: the data of a run without its training, one row's story, rows back from quarantine."""

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from flows.cli.options import AsJson, Changes, Force, Preset, prepared_spec
from flows.cli.output import Outcome

if TYPE_CHECKING:
    from data_contracts.data_reports import DatasetManifest
    from data_contracts.reports import Stage
    from data_contracts.run_spec import RunSpec


class _ShowByDefault(TyperGroup):
    """`tunegate data my.yaml` means `tunegate data show my.yaml`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = args and (args[0] in self.commands or args[0] in ctx.help_option_names)
        return super().parse_args(ctx, args if named else ["show", *args])


data_app = typer.Typer(
    name="data",
    cls=_ShowByDefault,
    help="Ingest, validate and split only, with a report on every row; `explain` a row, `release` rows.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@data_app.command("show")
def show_command(
    preset: Preset = None, changes: Changes = None, force: Force = False, as_json: AsJson = False
) -> Outcome:
    """Ingest, validate and split only, with a report on every row."""
    spec = prepared_spec(preset, changes)
    from flows.prepare_data import prepare_data

    return _page(spec, prepare_data(spec, force=force))


@data_app.command("explain")
def explain_command(
    row: Annotated[str, typer.Argument(help="FILE:LINE, or the first digits of a row id.")],
    preset: Preset = None,
    changes: Changes = None,
    as_json: AsJson = False,
) -> Outcome:
    """Show the whole story of one row: as it came in, what was done to it, where it is, its history."""
    from flows.cli.pages.data import show_stories
    from flows.config.load import load_spec
    from tasks.data.curation.explain import row_stories
    from tasks.runtime.store import Store

    spec = load_spec(preset, changes or []).spec
    stories = row_stories(Store.of(spec.store), spec.model.name, row)
    return Outcome({"rows": [story.model_dump(mode="json") for story in stories]}, partial(show_stories, stories))


@data_app.command("release")
def release_command(
    reason: Annotated[str, typer.Option("--reason", help="The reason that was wrong about the rows.")],
    why: Annotated[str, typer.Option("--why", metavar="TEXT", help="Why it was wrong; kept in the ledger.")],
    preset: Preset = None,
    rows: Annotated[list[str] | None, typer.Option("--row", metavar="ID", help="Only this row; repeatable.")] = None,
    changes: Changes = None,
    as_json: AsJson = False,
) -> Outcome:
    """Bring rows back from quarantine: all that a reason rejected, or some. Who did it and why is kept."""
    spec = prepared_spec(preset, changes)
    from flows.prepare_data import release_quarantined

    return _page(spec, release_quarantined(spec, reason, why, rows or []))


def _page(spec: "RunSpec", prepared: "tuple[DatasetManifest, list[Stage]]") -> Outcome:
    from flows.cli.pages.data import data_payload, show_dataset
    from tasks.runtime.store import Store

    (manifest, stages), store = prepared, Store.of(spec.store)
    return Outcome(data_payload(manifest, stages, store), partial(show_dataset, manifest, stages, store))
