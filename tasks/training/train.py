"""Train one arm in a child process that can be killed and goes on from its last checkpoint."""

import shutil
from typing import Any

from data_contracts.data_reports import FileRef
from data_contracts.reports import AdapterRef, BaseModelRef, LossPoint, Slot, TrainReport
from data_contracts.train_spec import Method, TrainSpec
from tasks.models.base import adapter_ref
from tasks.models.integrity import checked_adapter, checked_base
from tasks.runtime.processes import Launch, Watch, run_worker
from tasks.runtime.store import Store, without_place

# What the worker has no use for: it is told its own method, seed, rate, step-0 adapter, rows and threads.
_NOT_THE_WORKERS = {"methods", "seeds", "variants", "learning_rates", "warm_start", "replay_share", "parallel"}


def train_arm(
    store: Store, key: str, method: Method, seed: int, base: BaseModelRef, step0: AdapterRef | None, rows: FileRef,
    validation: FileRef, train: TrainSpec, precision: str, force: bool, watch: Watch, name: str, slot: Slot | None,
) -> TrainReport:  # fmt: skip
    """Run the worker in a folder named by the stage's key, so that the same work finds its own checkpoints.

    watch: is told of every step; name: what people call it; slot: its place beside other arms, if it has a place.
    """
    store.check_room()
    out = store.files / "training" / f"{method}-{key[-16:]}"
    spec: dict[str, Any] = train.model_dump(exclude=_NOT_THE_WORKERS) | {
        "method": method,
        "seed": seed,
        "learning_rate": train.learning_rates.get(method, train.learning_rate),
        "base": str(checked_base(store, base)),
        "base_name": without_place(base.name),
        "step0": str(checked_adapter(store, step0)) if step0 else None,
        "train": str(store.path(rows)),
        "validation": str(store.path(validation)),
        "precision": precision,
    }
    if slot:
        spec |= {"threads": slot.threads, "threads_reason": slot.why}
    gpu = slot.gpu if slot else None
    report = run_worker("tasks.training.workers.train_adapter", spec, out, Launch(f"train {name}", force, watch, gpu))
    for checkpoint in out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)  # the arm is complete: its optimiser state is of no more use
    loss = [LossPoint(**point) for point in report.pop("loss")]
    return TrainReport(
        **report,
        name=method,
        arm=method,
        seed=seed,
        adapter=adapter_ref(store, out / "adapter"),
        step0_sha256=step0.sha256 if step0 else None,
        side_by_side=slot.arms_at_once if slot else 1,
        useful_tokens_per_s=report["train_tokens"] / report["train_seconds"],
        loss=loss,
    )
