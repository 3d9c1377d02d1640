"""transformers.Trainer fed with packed rows, its loss taken over completion tokens only."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from peft.optimizers import create_loraplus_optimizer
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from data_contracts.errors import ConfigError, Problem
from data_contracts.jobs.training import TrainJob
from tasks.models.core.packing import ScoredSequence, Way, group_for_packing, shares
from tasks.models.workers.scoring import Batch, scored_losses, to_device, to_tensors
from tasks.runtime.workers.device import Device
from tasks.runtime.workers.harness import say
from tasks.runtime.workers.ranks import largest, rank, ranks, sum_gradients, total, wait
from tasks.training.workers.checkpoints import last_good, published
from tasks.training.workers.fsdp import divide_states, is_sharded, load_weights, shard, whole_states, whole_weights


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on: sequences, the rows they come from, and each optimiser step's sequences."""

    sequences: list[ScoredSequence]
    row_ids: list[str]
    plan: list[list[int]]
    validation: list[ScoredSequence]
    batch_tokens: int
    way: Way

    @cached_property
    def shares(self) -> list[list[list[int]]]:
        """Of each step: each rank's sequences."""
        return [
            [[step[i] for i in part] for part in shares([self.sequences[i] for i in step], ranks())]
            for step in self.plan
        ]

    @cached_property
    def mine(self) -> list[list[int]]:
        """This rank's sequences of each step."""
        return [step[rank()] for step in self.shares]

    def largest_shares(self) -> list[list[int]]:
        """Of each step: the share with the most tokens. Memory is each process's own."""
        return [max(step, key=lambda part: sum(len(self.sequences[i].ids) for i in part)) for step in self.shares]

    def scored_tokens(self, step: int) -> int:
        """Of all ranks."""
        return sum(len(self.sequences[i].ids) - self.sequences[i].start for i in self.plan[step])


@dataclass(frozen=True)
class StepOptions:
    """How steps are computed, whatever they learn from.

    micro_batches: parts of an optimiser step; 1 until memory runs out, then doubled. lora_plus_ratio: B's learning rate
    over A's; None: the same.
    """

    micro_batches: int = 1
    lora_plus_ratio: float | None = None
    is_sharded: bool = False


class PackedTrainer(Trainer):
    """Trainer whose steps, validation and checkpoints are those of packed rows.

    Several ranks divide the rows of each step. Gradients are added up once a step, after the last backward pass, and
    not by DistributedDataParallel during it: so a rank may have no row, or run out of memory and retry in smaller
    parts. Where the weights are divided too (`is_sharded`), ranks compute in step: none may be idle or retry.
    """

    def __init__(
        self, model: Any, data: TrainingData, args: TrainingArguments, callbacks: list[TrainerCallback],
        options: StepOptions = StepOptions(),
    ) -> None:  # fmt: skip
        super().__init__(model=model, args=args, train_dataset=data.sequences, eval_dataset=data.validation, callbacks=callbacks)  # fmt: skip
        self.remove_callback(PrinterCallback)
        self.data, self.options, self.micro_batches = data, options, options.micro_batches
        self.model_accepts_loss_kwargs = True
        if dist.is_initialized():  # by Ray also for one rank
            # accelerate's way of not wrapping a model: nothing else depends on it
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        if options.is_sharded:
            self.accelerator.prepare_model = lambda model, **_: model

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """One pass over the plan: it holds all epochs, so a resumed run skips to where it was."""
        rows: Any = self.data.sequences
        loader: DataLoader[Batch] = DataLoader(
            rows, batch_sampler=self.data.mine, collate_fn=partial(_batch, way=self.data.way)
        )
        return loader

    def create_optimizer(self, model: Any = None) -> Any:
        """Trainer's own, or with B's learning rate `options.lora_plus_ratio` times A's.

        By now a checkpoint's weights are in the model, and the optimiser must see those that are divided.
        """
        if self.options.is_sharded and not is_sharded(self.model):
            shard(self.model, self.args.device.type)
        if self.options.lora_plus_ratio is None or self.optimizer is not None:
            return super().create_optimizer(model)
        adapted: Any = self.model
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, adapted)
        ratio = {"loraplus_lr_ratio": self.options.lora_plus_ratio, "loraplus_weight_decay": self.args.weight_decay}
        self.optimizer = create_loraplus_optimizer(adapted, kind, **ratio, **options)
        return self.optimizer

    def load_weights_of(self, checkpoint: Path) -> None:
        """The weights of a checkpoint, an adapter's or all."""
        if is_sharded(self.model):
            load_weights(self.model, checkpoint)
        else:
            self._load_from_checkpoint(str(checkpoint))

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        """Gradients and mean loss (nats per completion token) of one optimiser step, in as few parts as memory
        allows."""
        tokens, part_step = self.data.scored_tokens(self.state.global_step), super().training_step
        while True:
            parts = self._parts(inputs)
            try:
                return self._agreed(model, [part_step(model, part, tokens) for part in parts])
            except (MemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                if is_sharded(model):
                    raise self._no_room(str(error).splitlines()[0]) from error
                self._halve(len(parts), str(error).splitlines()[0])
            # Outside of the except block: there the error still holds the tensors of the step.
            model.zero_grad()
            clear_device_cache(garbage_collection=True)

    def _agreed(self, model: Any, losses: list[torch.Tensor]) -> torch.Tensor:
        """The step's loss, from all ranks; their gradients are added up, and the next step has the same parts on
        all."""
        if ranks() == 1:
            return torch.stack(losses).sum()
        if is_sharded(model):  # which added up the gradients as it went back
            return torch.tensor(total([float(sum(losses))])[0], device=self.args.device)
        sum_gradients(parameter for parameter in model.parameters() if parameter.requires_grad)
        self.micro_batches = int(largest([self.micro_batches])[0])
        return torch.tensor(total([float(sum(losses))])[0], device=self.args.device)

    def _parts(self, inputs: Batch) -> list[Batch]:
        rows = [self.data.sequences[index] for index in self.data.mine[self.state.global_step]]
        if not rows and is_sharded(self.model):
            (first, *_) = self.data.plan[self.state.global_step]
            return [{**to_tensors([self.data.sequences[first]], self.data.way), "idle": True}]
        if self.micro_batches == 1 or not rows:
            return [inputs] if rows else []
        most_tokens = self.data.batch_tokens // self.micro_batches // ranks()
        return [to_tensors([rows[i] for i in group], self.data.way) for group in group_for_packing(rows, most_tokens)]

    def _halve(self, parts: int, cause: str) -> None:
        """Raise ConfigError if the step's rows are computed one by one already."""
        if parts == len(self.data.mine[self.state.global_step]):
            raise self._no_room(cause)
        self.micro_batches *= 2
        step = self.state.global_step + 1
        text = f"out of memory at step {step}: from here each step is computed in {self.micro_batches} parts"
        say("note", text=f"{text}, with the same rows and the same gradient")

    def _no_room(self, cause: str) -> ConfigError:
        rows = self.data.mine[self.state.global_step]
        longest = max(len(self.data.sequences[index].ids) for index in rows)
        act = "lower train.max_tokens, set train.activation_checkpointing, or take a smaller base"
        what = f"memory does not hold one row ({cause})"
        if is_sharded(self.model):
            act = "lower train.batch_tokens, set train.activation_checkpointing, or raise train.workers"
            what = f"memory does not hold this worker's share of a step ({cause}), and weights that are divided forbid a retry"
        return ConfigError(Problem(what, f"step {self.state.global_step + 1}", f"{longest} tokens", act))

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Sum of the part's losses over the step's completion tokens: the parts add up to the step's mean, in nats."""
        weight = 0.0 if inputs.pop("idle", False) else 1.0
        loss: torch.Tensor = _losses(model, inputs).sum() / num_items_in_batch
        return loss * weight

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Keep with each step how it was computed, so that a resumed run continues alike."""
        if "loss" in logs:
            logs["micro_batches"] = self.micro_batches
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss of the validation rows, reported to the callbacks as Trainer does."""
        metrics = {"eval_loss": mean_loss(self.model, self.data)}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step, out = self.state.global_step, Path(str(self.args.output_dir))
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        whole = whole_weights(model) if is_sharded(model) else None
        if not all(bool(torch.isfinite(weight).all()) for weight in (whole.values() if whole else weights)):
            act = f"lower train.learning_rate; {last_good(out)}"
            raise ConfigError(Problem("a weight is not finite", f"step {step}", act=act))
        optimizer: Any = self.optimizer
        states = [value for state in optimizer.state.values() for value in state.values()]
        tensors = weights + [value for value in states if isinstance(value, torch.Tensor)]
        needed_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        with published(out / f"checkpoint-{step}", needed_bytes) if rank() == 0 else nullcontext():
            self.whole = whole
            super()._save_checkpoint(model, trial)
            wait()  # for the random states of all ranks: the manifest covers them
        wait()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict or self.whole)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with whole_states(self.optimizer) if is_sharded(self.model) else nullcontext():
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if is_sharded(self.model):
            divide_states(self.optimizer)


def _losses(model: Any, batch: Batch) -> torch.Tensor:
    """Loss of each scored token, in nats: [N]."""
    losses: torch.Tensor = model(batch=batch) if is_sharded(model) else scored_losses(model, batch)
    return losses


def _batch(rows: Sequence[ScoredSequence], way: Way) -> Batch:
    """A rank that has no row in a step gets no tensors to compute with."""
    return to_tensors(rows, way) if rows else {"labels": torch.empty(0, dtype=torch.long)}


def mean_loss(model: Any, data: TrainingData) -> float:
    """Mean loss per completion token of the validation rows, in nats, divided among the ranks. There must be some."""
    model.eval()
    device = next(model.parameters()).device
    summed, tokens = 0.0, 0
    groups = list(group_for_packing(data.validation, data.batch_tokens))
    # With weights that are divided all ranks compute each layer together, and its weights must be fit for training later.
    sharded = is_sharded(model)
    with torch.no_grad() if sharded else torch.inference_mode():
        for group in groups if sharded else groups[rank() :: ranks()]:
            rows: Sequence[ScoredSequence] = [data.validation[i] for i in group]
            losses = _losses(model, to_device(to_tensors(rows, data.way), device))
            summed, tokens = summed + float(losses.sum()), tokens + len(losses)
    summed, tokens_of_all = total([summed, tokens])
    return summed / tokens_of_all


def training_arguments(job: TrainJob, out: Path, device: Device, steps: int) -> TrainingArguments:
    """The settings as Trainer knows them. Its own filter of NaN losses is off: it would hide them behind a mean."""
    settings = job.settings
    validates = settings.validation_steps is not None
    return TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(settings.warmup_ratio * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim=settings.optimizer,
        gradient_checkpointing=settings.activation_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.activation_checkpointing else None,
        bf16=device.precision == "bf16",
        use_cpu=device.device == "cpu",
        ddp_backend="gloo" if ranks() > 1 and device.device == "cpu" else None,
        average_tokens_across_devices=False,  # the plan says how many tokens a step scores
        seed=job.seed,
        save_steps=settings.checkpoint_steps,
        eval_strategy="steps" if validates else "no",
        eval_steps=settings.validation_steps,
        metric_for_best_model="loss" if validates else None,
        greater_is_better=False if validates else None,
        restore_callback_states_from_checkpoint=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,
    )


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or should_reduce_batch_size(error)
