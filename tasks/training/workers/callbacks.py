"""Trainer callbacks that watch a run: its clock, its memory, its loss, its end on a signal, its best adapter."""

import math
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from data_contracts.errors import ConfigError, Problem, TransientError
from tasks.models.workers.loading import tensor_bytes
from tasks.runtime.workers.harness import say
from tasks.runtime.workers.ranks import largest
from tasks.training.workers.checkpoints import last_good
from tasks.training.workers.trainer import TrainingData

_SMOOTHED_STEPS = 10


class Clock(TrainerCallback):
    """Adds each step's seconds to Trainer's log, which its checkpoints keep, and reports it to the parent."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        say("start", step=state.global_step, of=state.max_steps)
        self.last = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        now = time.monotonic()
        state.log_history[-1]["step_seconds"] = now - self.last
        self.last = now
        say("step", step=state.global_step, of=state.max_steps, loss_nats=logs["loss"])

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = time.monotonic()  # validation is no training time
        say("note", text=f"step {state.global_step}: validation loss {kwargs['metrics']['eval_loss']:.4f} nats/token")


class StepBytes(TrainerCallback):
    """Adds what gradients and optimiser states take to Trainer's log of the first step after each start."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.found: dict[str, int] = {}
        self.is_logged = False

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are still there."""
        if self.found:
            return
        states = [value for own in kwargs["optimizer"].state.values() for value in own.values()]
        grads = [weight.grad for weight in kwargs["model"].parameters() if weight.grad is not None]
        self.found = {
            "gradients_bytes": tensor_bytes(grads),
            "optimiser_bytes": tensor_bytes(value for value in states if isinstance(value, torch.Tensor)),
        }

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"] and not self.is_logged:
            state.log_history[-1] |= self.found
            self.is_logged = True


class LossWatch(TrainerCallback):
    """Stops a run whose loss or gradient is not finite, or whose loss climbs, before that reaches a checkpoint."""

    def __init__(self, data: TrainingData, out: Path, max_rise_nats: float | None) -> None:
        self.data, self.out = data, out
        self.max_rise = math.inf if max_rise_nats is None else max_rise_nats

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.recent: deque[float] = deque(maxlen=_SMOOTHED_STEPS)
        self.lowest = math.inf
        for entry in state.log_history:
            if "loss" in entry:
                self._rise(entry["loss"])

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        for what, value in (("loss", logs["loss"]), ("gradient norm", logs["grad_norm"])):
            if not math.isfinite(value):
                raise self._error(state.global_step, logs, f"the {what} is {value}", "a finite number")
        rise = self._rise(logs["loss"])
        if rise > self.max_rise:
            what = f"the loss, smoothed over {_SMOOTHED_STEPS} steps, is {rise:.2f} nats above its lowest"
            raise self._error(state.global_step, logs, what, f"{self.max_rise} nats (train.max_loss_rise_nats)")

    def _rise(self, loss: float) -> float:
        """How far the mean of the last steps is above its lowest, in nats; 0 until there are enough steps."""
        self.recent.append(loss)
        if len(self.recent) < _SMOOTHED_STEPS:
            return 0.0
        smoothed = sum(self.recent) / len(self.recent)
        self.lowest = min(self.lowest, smoothed)
        return smoothed - self.lowest

    def _error(self, step: int, logs: dict[str, float], what: str, limit: str) -> ConfigError:
        rows = sorted({self.data.row_ids[index][:12] for index in self.data.plan[step - 1]})
        facts = (
            f"loss {logs['loss']:.4g}, gradient norm {logs['grad_norm']:.4g}, learning rate {logs['learning_rate']:.3g}"
        )
        act = "lower train.learning_rate, or look at the rows with `tunegate data explain ID`"
        where = f"step {step} ({facts}; rows {', '.join(rows)})"
        return ConfigError(Problem(what, where, limit, f"{act}; {last_good(self.out)}"))


class KeepBest(EarlyStoppingCallback):
    """Keeps a checkpoint of every lowest validation loss; stops after `patience` validations without one.

    Trainer saves and restores the count by the name of the class.
    """

    def __init__(self, early_stopping_patience: int | None = None, early_stopping_threshold: float = 0.0) -> None:
        super().__init__(early_stopping_patience or sys.maxsize, early_stopping_threshold)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Nothing: Trainer's own class warns here that the best adapter is not loaded, which the worker does."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:  # type: ignore[override]
        super().on_evaluate(args, state, control, metrics, **kwargs)  # type: ignore[no-untyped-call]
        is_best = self.early_stopping_patience_counter == 0
        control.should_save = control.should_save or is_best or control.should_training_stop


def stopped_early(state: dict[str, Any]) -> bool:
    """Whether the run of this Trainer state has ended because its validation loss fell no further."""
    kept = state.get("stateful_callbacks", {}).get(KeepBest.__name__)
    if not kept:
        return False
    return bool(kept["attributes"]["early_stopping_patience_counter"] >= kept["args"]["early_stopping_patience"])


class StopOnSignal(TrainerCallback):
    """SIGTERM and SIGINT end a run with a checkpoint of the current step."""

    signalled: str | None = None
    agreed = False  # by all ranks: a signal reaches them in different steps

    @contextmanager
    def listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # Ray's: signals are for its own process
            yield
            return
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self._remember) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: Any) -> None:
        self.signalled = signal.Signals(number).name

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.agreed = largest([self.signalled is not None])[0] > 0
        control.should_save = control.should_save or self.agreed

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.agreed:
            cause = self.signalled or "a signal to another rank"
            what = f"stopped at step {state.global_step} of {state.max_steps} by {cause}, with a checkpoint"
            raise TransientError(Problem(what, "training", act="run again to resume"))
