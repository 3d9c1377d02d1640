"""RunSpec: every knob of a run, once, with its meaning, unit and range. Defaults live only here and in data_spec.py."""

from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from data_contracts.data_spec import ContractSpec, CurateSpec, DataSpec, Fraction, RulesSpec, Section, holds_secret
from data_contracts.method_rules import refusals, unread_by
from data_contracts.schedule_spec import ScheduleSpec

Method = Literal["lora", "qlora", "full", "prefix"]
QuantType = Literal["nf4", "fp4"]
Form = Literal["full", "merged"]


class ModelSpec(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "tunegate-model"
    """Name in the MLflow registry, and the scope of the row ledger."""
    base: str = "builtin:smollm2-135m"
    """Base model: `builtin:smollm2-135m`, `builtin:tiny-llama` (random, for tests), a folder, or a hub id."""
    revision: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+([./][A-Za-z0-9_-]+)*$")] | None = None
    """Hub revision (commit) of the base; null takes the newest and records which it was."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of weights and arithmetic; `auto` takes bf16 only where the device has it in hardware."""


class VariantSpec(Section):
    """A further arm: a method with some dials of `train` set otherwise."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_.]*$")]
    """Its name in tables, plots and MLflow."""
    method: Method
    dials: dict[str, Any]
    """What differs: any dial of `train` that shapes the result, such as {rank: 64, alpha: 128}."""


class TrainSpec(Section):
    methods: Annotated[list[Method], Field(min_length=1)] = ["lora", "qlora"]
    """Arms to train, in this order: `lora`, `qlora`, `full` (every weight), `prefix` (arXiv 2101.00190); see
    docs/methods.md. The verdict needs lora and qlora; of several arms qlora may be released, else lora, else the last."""
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [17]
    """Every arm is trained once with each: seed of the step-0 adapter, of dropout and of the data order. The first one's
    adapter may be released; the others tell how much of a difference is chance. Three or more for a claim about a method."""
    variants: list[VariantSpec] = []
    """Further arms with dials of their own: [{name: qlora_r64, method: qlora, dials: {rank: 64, alpha: 128}}]."""
    rank: Annotated[int, Field(ge=1)] = 16
    """LoRA rank r (arXiv 2106.09685)."""
    alpha: Annotated[int, Field(ge=1)] = 32
    """LoRA scale: the update is multiplied by alpha / rank; 2 x rank is the common choice."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout before LoRA's A matrix."""
    target_modules: str | list[str] = "all-linear"
    """Layers that get an adapter; all linear ones are needed to match full tuning (arXiv 2305.14314)."""
    use_rslora: bool = False
    """Scale LoRA's update by alpha / sqrt(rank) instead: a high rank learns no slower (rsLoRA, arXiv 2312.03732)."""
    use_dora: bool = False
    """Train a magnitude for each output beside LoRA's direction (DoRA, arXiv 2402.09353). Slower, more memory."""
    init: Literal["default", "pissa", "olora", "loftq"] = "default"
    """Start of LoRA's A and B: random and zero; the base's principal parts (`pissa`, arXiv 2404.02948) or its QR parts
    (`olora`, arXiv 2406.01775), taken off again; or, in the qlora arm, what quantisation lost (`loftq`, arXiv 2310.08659)."""
    lora_plus_ratio: Annotated[float, Field(ge=1.0)] | None = None
    """How many times A's learning rate LoRA's B gets: the authors advise 16 and a lower learning_rate (LoRA+, arXiv
    2402.12354). null: one rate for both."""
    quant_type: QuantType = "nf4"
    """4-bit numbers of the qlora arm's base: spaced as a normal distribution, or as floats (arXiv 2305.14314)."""
    double_quant: bool = True
    """Quantise the quantisation constants too: 0.127 bit a weight instead of 0.5 (arXiv 2305.14314)."""
    prefix_tokens: Annotated[int, Field(ge=1)] = 16
    """Virtual tokens of the prefix arm, whose keys and values in every layer are trained (arXiv 2101.00190)."""
    neftune_alpha: Annotated[float, Field(gt=0.0)] | None = None
    """Uniform noise on the embeddings while training, up to alpha / sqrt(tokens x hidden size); 5 to 15 were tried
    (NEFTune, arXiv 2310.05914). null: none."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 2e-4
    """Peak learning rate; cosine decay to zero after the warm-up."""
    learning_rates: dict[Method, Annotated[float, Field(gt=0.0)]] = {}
    """Peak learning rates of single arms instead: `full` wants about a tenth of LoRA's, `prefix` ten times and more."""
    warmup_ratio: Fraction = 0.05
    """Share of the steps in which the rate rises from zero."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """AdamW weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0
    """Gradient norm from which gradients are scaled down."""
    optimizer: str = "adamw_torch"
    """Any `optim` name of transformers.TrainingArguments; bitsandbytes' 8-bit ones are slow on CPUs."""
    epochs: Annotated[int, Field(ge=1)] = 1
    """Passes over the training rows."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimiser steps after which training stops; null trains all epochs."""
    batch_tokens: Annotated[int, Field(ge=16)] = 1024
    """Most tokens (prompts and answers together) in one optimiser step; memory grows with it."""
    max_tokens: Annotated[int, Field(ge=16)] = 1024
    """Longest row in tokens that the model sees; held-out rows that are longer are not scored, and counted."""
    too_long: Literal["leave_out", "truncate", "split"] = "leave_out"
    """What becomes of longer training rows: left out; cut in the middle of the prompt and at the end of the answer;
    or split into several with the answer in pieces. All are listed and counted."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third slower, far less memory."""
    checkpoint_steps: Annotated[int, Field(ge=1)] = 20
    """Steps between checkpoints: what a crash can cost."""
    validation_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps between measurements of the validation loss; the adapter with the lowest is kept. null measures at the end."""
    early_stopping_patience: Annotated[int, Field(ge=1)] | None = None
    """Measurements in a row without a lower validation loss after which training stops; null never stops early."""
    max_loss_rise_nats: Annotated[float, Field(gt=0.0)] | None = 2.0
    """How far the training loss, as the mean of 10 steps, may rise above its lowest before training stops with an error,
    in nats per token: 2 is a perplexity 7.4 times as high. null never stops."""
    warm_start: Literal["never", "champion"] = "never"
    """What LoRA's arms start from: a fresh adapter, on all training rows; or the `champion`'s, on the rows that are new to
    it and a share of old ones. Where its adapter does not fit: from scratch, with the reason. See docs/training.md."""
    replay_share: Fraction = 0.5
    """Share of a warm start's rows that the champion has seen before, against forgetting: 0 replays none, 1 all."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads of a worker; null takes the cores that are free."""
    parallel: Annotated[int, Field(ge=1)] = 1
    """Arms that train at the same time, each on a GPU of its own or on an equal share of the free cores, or where `engine:
    ray` finds room. What each is and how much memory it takes stay the same; speeds are then those of arms side by side,
    see docs/devices.md."""
    workers: Annotated[int, Field(ge=1)] = 1
    """Processes that train one arm together, each on a GPU of its own or a share of the cores, see docs/devices.md. A step
    has the same rows, and its gradient is the same but for rounding."""
    engine: Literal["local", "ray"] = "local"
    """Where arms train: on this machine, or on a Ray cluster that sees the store (`[ray]`), which finds a place for every
    worker of every arm."""
    sharding: Literal["none", "fsdp"] = "none"
    """What each of several workers holds: `none` all weights; `fsdp` a part of every layer, which lets a base train that no
    single GPU holds, and costs traffic between them."""

    @model_validator(mode="after")
    def _dials_fit_together(self) -> "TrainSpec":
        found = list(refusals(self)) + list(self._variant_problems())
        if len(set(self.seeds)) < len(self.seeds):
            found.append("seeds must differ from each other")
        if found:
            raise ValueError("\n".join(found))
        return self

    def _variant_problems(self) -> Iterator[str]:
        names = [*get_args(Method), "base", "champion", "candidate", *(variant.name for variant in self.variants)]
        yield from (f"variants: the name {n} is taken" for n, count in Counter(names).items() if count > 1)
        for variant in self.variants:
            if fixed := sorted(_FOR_ALL_ARMS & variant.dials.keys()):
                yield f"variants: {variant.name} cannot have its own {', '.join(fixed)}: the same for every arm"
                continue
            try:
                self.of(variant.method, variant.dials)
            except ValidationError as error:
                yield from (f"variants: {variant.name}: {_one_line(detail)}" for detail in error.errors())

    def of(self, method: Method, dials: dict[str, Any]) -> "TrainSpec":
        """The dials of one arm. Those of the others, which it does not read, are as if nobody had turned them."""
        rates = {} if "learning_rate" in dials else {m: r for m, r in self.learning_rates.items() if m == method}
        alone = {"methods": [method], "variants": [], "learning_rates": rates}
        own = self.model_dump() | dials
        unread = {dial: TrainSpec.model_fields[dial].default for dial in unread_by(method, own) if dial not in dials}
        return TrainSpec.model_validate(own | unread | alone)


# What makes arms comparable, and how they are run.
_FOR_ALL_ARMS = frozenset({"methods", "seeds", "variants", "threads", "parallel", "workers", "engine", "sharding"})


def _one_line(detail: Any) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    return f"{where} {detail['msg']}".replace("Value error, ", "").replace("\n", "; ").strip()


DOMAIN_TASKS = ("domain_nll", "domain_choice", "domain_generate")
"""The tasks that need nothing but the test split."""


class EvaluateSpec(Section):
    tasks: Annotated[list[str], Field(min_length=1)] = list(DOMAIN_TASKS)
    """lm-eval tasks: three built from the test split; `general_nll`, `general_openbookqa`, `general_piqa` and `general_siqa`
    (text and questions of no domain, offline); and any lm-eval task whose data can be had. See docs/evaluation.md."""
    task_folder: str | None = None
    """Folder with lm-eval task files (YAML) of your own, and their data; their names go into `tasks`."""
    max_items: Annotated[int, Field(ge=2)] = 1000
    """Most test rows scored (lowest hash first: the same ones each time)."""
    task_limit: Annotated[int, Field(ge=1)] | None = None
    """Most items of each further lm-eval task; null scores all."""
    generate_items: Annotated[int, Field(ge=1)] = 64
    """Most test questions that domain_generate answers: writing costs far more than scoring."""
    generate_tokens: Annotated[int, Field(ge=1)] = 64
    """Longest answer of domain_generate in tokens; only questions whose true answer is no longer are asked."""
    forms: list[Form] = []
    """Further forms in which the qlora arm's adapter may be served, scored beside the 4-bit base it was trained on: `full`
    on the full-precision base, `merged` into its weights as 16-bit numbers."""
    batch_tokens: Annotated[int, Field(ge=16)] = 512
    """Most tokens in one forward pass."""
    sample_questions: Annotated[int, Field(ge=0)] = 3
    """Test questions answered by every model, to read beside the numbers."""
    sample_tokens: Annotated[int, Field(ge=1)] = 48
    """Longest sample answer in tokens."""


Nats = Annotated[float, Field(ge=0.0)]


class GateSpec(Section):
    """Each gate is one dial, and null turns it off: what is not written here is not judged."""

    min_lora_gain_nats: Nats | None = 0.0
    """LoRA's loss must lie more than this below the base's, in nats per token, or a comparison with it says nothing."""
    min_retention: Fraction | None = 0.95
    """QLoRA must keep at least this share of LoRA's loss gain."""
    max_accuracy_drop: Fraction | None = 0.02
    """How far QLoRA's accuracy in domain_choice may lie below LoRA's, as a share of the items."""
    min_gain_nats: Nats | None = 0.0
    """The candidate's loss must lie more than this below the base's, in nats per token."""
    max_champion_nll_increase_nats: Nats | None = 0.02
    """How much worse than the champion a candidate may be, in nats per token: 0.02 is 2 % of perplexity. With 0 a
    candidate that is as good as the champion is never decided."""
    max_forgetting_nats: Nats | None = None
    """How much worse than the base the candidate may be on general text (general_nll), in nats per token."""
    max_forgetting_accuracy: Fraction | None = None
    """How far the candidate's accuracy may lie below the base's in each task of general knowledge, as a share of the items."""
    min_slice_gain_nats: Nats | None = 0.0
    """The candidate's loss must lie more than this below the base's in every slice: source, language, length."""
    min_slice_items: Annotated[int, Field(ge=2)] = 30
    """Slices with fewer items are shown, not judged."""
    min_stop_rate: Fraction | None = 0.8
    """Share of domain_generate's answers that the candidate must end by itself."""
    max_ms_per_token: Annotated[float, Field(gt=0.0)] | None = None
    """Longest time of one written token, in milliseconds, one answer at a time, on this machine."""
    max_memory_gb: Annotated[float, Field(gt=0.0)] | None = None
    """Most memory of a process that loads the candidate and answers, in GB, on this machine."""
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    """Level of each end of an interval: 0.95 means that the truth lies below the lower end in 5 % of all cases."""
    bootstrap_draws: Annotated[int, Field(ge=100)] = 10_000
    """Bootstrap resamples behind each interval."""


class StoreSpec(Section):
    root: str = "mlruns"
    """Folder of everything a run keeps: MLflow's database, artifacts, snapshots, checkpoints, Prefect's state."""
    mlflow_uri: str | None = None
    """MLflow tracking server; null uses the database in `root`. Its password comes from the environment."""

    @model_validator(mode="after")
    def _no_address_holds_a_secret(self) -> "StoreSpec":
        if self.mlflow_uri and holds_secret(self.mlflow_uri):
            act = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for a server, PGPASSWORD for Postgres"
            raise ValueError(f"mlflow_uri holds a password; put it in the environment: {act}")
        return self


class RunSpec(Section):
    """One run. Sections mirror the stages."""

    data: DataSpec = DataSpec()
    rules: RulesSpec = RulesSpec()
    contract: ContractSpec = ContractSpec()
    curate: CurateSpec = CurateSpec()
    model: ModelSpec = ModelSpec()
    train: TrainSpec = TrainSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    gates: GateSpec = GateSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    store: StoreSpec = StoreSpec()

    @model_validator(mode="after")
    def _gates_can_be_judged(self) -> "RunSpec":
        if found := list(_unmeasured(self.evaluate, self.gates)):
            raise ValueError("\n".join(found))
        return self


def _unmeasured(evaluate: EvaluateSpec, gates: GateSpec) -> Iterator[str]:
    """Gates whose numbers no task would give: they would fail every candidate."""
    needs = {
        "min_lora_gain_nats": "domain_nll", "min_retention": "domain_nll", "max_accuracy_drop": "domain_choice",
        "min_gain_nats": "domain_nll", "max_champion_nll_increase_nats": "domain_nll",
        "max_forgetting_nats": "general_nll", "min_slice_gain_nats": "domain_nll", "min_stop_rate": "domain_generate",
    }  # fmt: skip
    for gate, task in needs.items():
        if getattr(gates, gate) is not None and task not in evaluate.tasks:
            yield f"gates.{gate} needs {task} in evaluate.tasks; set it to null to judge without it"
    if gates.max_forgetting_accuracy is not None and not set(evaluate.tasks) - {*DOMAIN_TASKS, "general_nll"}:
        yield "gates.max_forgetting_accuracy needs a task of general knowledge in evaluate.tasks, such as general_piqa"
