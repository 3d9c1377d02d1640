"""Train one arm in a child process that can be killed and resumes from its last checkpoint."""

import shutil
from dataclasses import replace

from data_contracts.jobs.training import TrainJob
from data_contracts.reports import Slot, TrainReport
from data_contracts.stage_inputs import TrainInputs
from data_contracts.train_spec import TrainSpec
from tasks.models.integrity import adapter_ref, checked_adapter, checked_base
from tasks.runtime.processes import Launch, run_worker
from tasks.runtime.store import Store, without_place

_PLACES_ARMS = ("seeds", "variants", "warm_start", "replay_share", "parallel")
"""Settings that only choose or place arms. The worker's job has their defaults: a worker whose job is the same does not
train again."""


def train_arm(store: Store, key: str, inputs: TrainInputs, launch: Launch, slot: Slot | None = None) -> TrainReport:
    """Run the worker in a folder named by the stage's key, so that the same work finds its own checkpoints.

    slot: the arm's place, where several train at the same time.
    """
    store.check_room()
    out = store.files / "training" / f"{inputs.method}-{key[-16:]}"
    report = run_worker(
        "tasks.training.workers.train_adapter",
        job_of(store, inputs, slot),
        out,
        replace(launch, gpu=slot.gpu) if slot else launch,
    )
    for checkpoint in out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)  # the arm is complete: its optimiser state is of no more use
    return TrainReport(
        **report,
        name=inputs.method,
        arm=inputs.method,
        seed=inputs.seed,
        adapter=adapter_ref(store, out / "adapter"),
        step0_sha256=inputs.step0.sha256 if inputs.step0 else None,
        side_by_side=slot.arms_at_once if slot else 1,
    )


def job_of(store: Store, inputs: TrainInputs, slot: Slot | None) -> TrainJob:
    """Raises StoreError if the base or the step-0 adapter is not what it was."""
    train = inputs.settings
    own = {name: TrainSpec.model_fields[name].get_default(call_default_factory=True) for name in _PLACES_ARMS}
    own |= {"learning_rate": train.learning_rates.get(inputs.method, train.learning_rate), "learning_rates": {}}
    own |= {"methods": [inputs.method]} | ({"threads": slot.threads} if slot else {})
    return TrainJob(
        method=inputs.method,
        seed=inputs.seed,
        base=checked_base(store, inputs.base),
        base_name=without_place(inputs.base.name),
        step0=checked_adapter(store, inputs.step0) if inputs.step0 else None,
        train=store.path(inputs.rows),
        validation=store.path(inputs.validation),
        precision=inputs.precision,
        threads_reason=slot.why if slot else None,
        settings=train.model_copy(update=own),
    )
