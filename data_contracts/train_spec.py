"""TrainSpec: every setting of training, which of them go together and why not, and the arms that a spec asks for."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import AliasChoices, Field, ValidationError, model_validator

from data_contracts.data_spec import Fraction, Section

Method = Literal["lora", "qlora", "full", "prefix"]
QuantType = Literal["nf4", "fp4"]


class VariantSpec(Section):
    """A further arm: a method with some settings of `train` set otherwise."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_.]*$")]
    """Its name in tables, plots and MLflow."""
    method: Method
    settings: Annotated[dict[str, Any], Field(validation_alias=AliasChoices("settings", "dials"))]
    """What differs: any setting of `train` that shapes the result, such as {rank: 64, alpha: 128}."""


class TrainSpec(Section):
    methods: Annotated[list[Method], Field(min_length=1)] = ["lora", "qlora"]
    """Arms to train, in this order: `lora`, `qlora`, `full` (every weight), `prefix` (arXiv 2101.00190); see
    docs/methods.md. The verdict needs lora and qlora; of several arms qlora may be released, else lora, else the
    last."""
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [17]
    """Every arm is trained once with each: seed of the step-0 adapter, of dropout and of the data order. The first
    one's adapter may be released; the others show how much of a difference is chance. Three or more for a claim about a
    method."""
    variants: list[VariantSpec] = []
    """Further arms with settings of their own: [{name: qlora_r64, method: qlora, settings: {rank: 64, alpha: 128}}]."""
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
    """Train a magnitude for each output in addition to LoRA's direction (DoRA, arXiv 2402.09353). Slower, more
    memory."""
    init: Literal["default", "pissa", "olora", "loftq"] = "default"
    """Start of LoRA's A and B: random and zero; the base's principal parts (`pissa`, arXiv 2404.02948) or its QR parts
    (`olora`, arXiv 2406.01775), taken off again; or, in the qlora arm, what quantisation lost (`loftq`, arXiv
    2310.08659)."""
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
    """What is done with longer training rows: left out; cut in the middle of the prompt and at the end of the answer;
    or split into several with the answer in pieces. All are listed and counted."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third slower, far less memory."""
    checkpoint_steps: Annotated[int, Field(ge=1)] = 20
    """Steps between checkpoints: what a crash can cost."""
    validation_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps between measurements of the validation loss; the adapter with the lowest is kept. null measures at the
    end."""
    early_stopping_patience: Annotated[int, Field(ge=1)] | None = None
    """Measurements in a row without a lower validation loss after which training stops; null never stops early."""
    max_loss_rise_nats: Annotated[float, Field(gt=0.0)] | None = 2.0
    """How far the training loss, as the mean of 10 steps, may rise above its lowest before training stops with an
    error, in nats per token: 2 is a perplexity 7.4 times as high. null never stops."""
    warm_start: Literal["never", "champion"] = "never"
    """What LoRA's arms start from: a fresh adapter, on all training rows; or the `champion`'s, on the rows that are new
    to it and a share of old ones. Where its adapter does not fit: from scratch, with the reason. See
    docs/training.md."""
    replay_share: Fraction = 0.5
    """Share of a warm start's rows that the champion has seen before, against forgetting: 0 replays none, 1 all."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads of a worker; null takes the cores that are free."""
    parallel: Annotated[int, Field(ge=1)] = 1
    """Arms that train at the same time, each on a GPU of its own or on an equal share of the free cores, or where
    `engine: ray` finds room. What each is and how much memory it takes stay the same; speeds are then those of arms
    side by side, see docs/devices.md."""
    workers: Annotated[int, Field(ge=1)] = 1
    """Processes that train one arm together, each on a GPU of its own or a share of the cores, see docs/devices.md. A
    step has the same rows, and its gradient is the same but for rounding."""
    engine: Literal["local", "ray"] = "local"
    """Where arms train: on this machine, or on a Ray cluster that sees the store (`[ray]`), which finds a place for
    every worker of every arm."""
    sharding: Literal["none", "fsdp"] = "none"
    """What each of several workers holds: `none` all weights; `fsdp` a part of every layer, which lets a base train
    that no single GPU holds, and costs traffic between them."""

    @model_validator(mode="after")
    def _settings_fit_together(self) -> "TrainSpec":
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
            if fixed := sorted(_FOR_ALL_ARMS & variant.settings.keys()):
                yield f"variants: {variant.name} cannot have its own {', '.join(fixed)}: the same for every arm"
                continue
            try:
                self.of(variant.method, variant.settings)
            except ValidationError as error:
                yield from (f"variants: {variant.name}: {_one_line(detail)}" for detail in error.errors())

    def of(self, method: Method, settings: dict[str, Any]) -> "TrainSpec":
        """The settings of one arm. Those of the others, which it does not read, are at their defaults."""
        rates = {} if "learning_rate" in settings else {m: r for m, r in self.learning_rates.items() if m == method}
        alone = {"methods": [method], "variants": [], "learning_rates": rates}
        own = self.model_dump() | settings
        unread = {
            setting: TrainSpec.model_fields[setting].default
            for setting in unread_by(method, own)
            if setting not in settings
        }
        return TrainSpec.model_validate(own | unread | alone)


# What makes arms comparable, and how they are run.
_FOR_ALL_ARMS = frozenset({"methods", "seeds", "variants", "threads", "parallel", "workers", "engine", "sharding"})


def _one_line(detail: Any) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    return f"{where} {detail['msg']}".replace("Value error, ", "").replace("\n", "; ").strip()


LORA_ARMS = ("lora", "qlora")
"""Arms that train LoRA layers."""

_READ_BY = {
    "quant_type": ("qlora",),
    "double_quant": ("qlora",),
    "dropout": LORA_ARMS,
    "use_rslora": LORA_ARMS,
    "use_dora": LORA_ARMS,
    "init": LORA_ARMS,
    "lora_plus_ratio": LORA_ARMS,
    "prefix_tokens": ("prefix",),
}

_IN_EVERY_PRESET = ("rank", "alpha", "target_modules")
"""LoRA's, and set by presets for anyone who adds such an arm: without one they are no reason to refuse a run."""

_SORTING = ("galore", "apollo", "lomo", "adalomo")
"""Optimisers of transformers that are made from a model instead of groups of weights."""


def refusals(train: Any) -> Iterator[str]:
    """Every reason why the settings of a TrainSpec do not fit together; none if they do."""
    yield from _unread(train)
    yield from _impossible(train)
    if train.early_stopping_patience is not None and train.validation_steps is None:
        yield "early_stopping_patience counts validations: set validation_steps too"
    if train.warm_start == "never" and train.replay_share != type(train).model_fields["replay_share"].default:
        yield "replay_share is of a warm start's rows: set warm_start to champion, or leave replay_share out"


def unread_by(method: str, settings: Mapping[str, Any]) -> list[str]:
    """The settings that an arm with this method and these settings does not read."""
    found = [setting for setting, arms in _READ_BY.items() if method not in arms]
    return [*found, "replay_share"] if settings["warm_start"] == "never" else found


def without_effect(train: Any) -> list[str]:
    """Settings of a TrainSpec that no arm reads, and that are not refused for it."""
    arms = {*train.methods, *(variant.method for variant in train.variants)}
    return [] if arms & set(LORA_ARMS) else list(_IN_EVERY_PRESET)


def _unread(train: Any) -> Iterator[str]:
    """A setting that differs from its default, and that no arm reads."""
    for setting, arms in _READ_BY.items():
        is_set = getattr(train, setting) != type(train).model_fields[setting].default
        if is_set and not set(arms) & set(train.methods):
            yield f"{setting} has an effect on {' and '.join(arms)} only: add one to methods, or leave {setting} out"
    for arm in sorted(set(train.learning_rates) - set(train.methods)):
        yield f"learning_rates has one for {arm}, which is no arm of this run: add it to methods, or leave it out"


def _impossible(train: Any) -> Iterator[str]:
    if len(set(train.methods)) < len(train.methods):
        yield "methods names an arm twice: each is trained once"
    if train.use_dora and train.init != "default":
        yield f"use_dora takes its magnitudes from the untouched base, and init={train.init} starts elsewhere: drop one"
    if train.warm_start != "never" and train.init != "default":
        yield f"warm_start begins with the champion's adapter, and init={train.init} with parts of the base: drop one"
    if train.init == "loftq" and "qlora" not in train.methods:
        yield "init=loftq makes up for what quantisation lost, and no arm is quantised: add qlora to methods"
    if train.lora_plus_ratio is not None and train.optimizer.startswith(_SORTING):
        yield f"{train.optimizer} sorts the weights itself, so LoRA's B cannot get a rate of its own: drop lora_plus_ratio"
    if train.parallel > 1 and train.workers > 1 and train.engine == "local":
        yield "parallel gives each arm one GPU or one share of the cores, and workers takes several: set one of them to 1"
    if train.sharding != "none":
        yield from _undivided(train)
    if "prefix" in train.methods and train.activation_checkpointing:
        yield "prefix hands its keys and values on in a cache, which activation_checkpointing drops: switch it off"


def _undivided(train: Any) -> Iterator[str]:
    """What dividing the weights among workers does not cover."""
    if train.workers == 1:
        yield "sharding divides weights among workers: set workers to 2 or more, or sharding to none"
    if any(word in train.optimizer for word in ("8bit", "paged", "bnb")):
        yield "bitsandbytes' optimisers know no divided weights: set optimizer to adamw_torch, or sharding to none"
    if others := sorted(set(train.methods) - set(LORA_ARMS)):
        yield f"sharding divides the base below LoRA's adapters, and not {' or '.join(others)}: leave out one of the two"
    if train.init != "default" or train.use_dora or train.lora_plus_ratio is not None:
        yield "sharding is for plain LoRA layers: leave out init, use_dora and lora_plus_ratio, or set sharding to none"


class Arm(NamedTuple):
    """One training. name: unique in the run; arm: what is compared over the seeds; settings: `train` as this arm sees
    it."""

    name: str
    arm: str
    method: Method
    seed: int
    settings: TrainSpec


def arms_of(train: TrainSpec) -> list[Arm]:
    """Methods in their order, then variants; of each one training a seed, in the order of the seeds."""
    own: list[tuple[str, Method, dict[str, Any]]] = [(method, method, {}) for method in train.methods]
    own += [(variant.name, variant.method, variant.settings) for variant in train.variants]
    return [
        Arm(name_of(arm, seed, train.seeds), arm, method, seed, train.of(method, settings))
        for arm, method, settings in own
        for seed in train.seeds
    ]


def name_of(arm: str, seed: int, seeds: Sequence[int]) -> str:
    """A single seed needs no name of its own."""
    return arm if len(seeds) == 1 else f"{arm}-{seed}"


def candidate_arm(arms: Sequence[str]) -> str:
    """The arm that may be released: qlora, else lora, else the last."""
    return next((name for name in ("qlora", "lora") if name in arms), arms[-1])
