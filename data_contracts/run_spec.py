"""RunSpec: every knob of a run, once, with its meaning, unit and range. Defaults live only here."""

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_contracts.method_rules import refusals
from data_contracts.rules import LEAKS, UNREADABLE, Action, Reason

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Method = Literal["lora", "qlora", "full", "prefix"]
QuantType = Literal["nf4", "fp4"]
Format = Literal["auto", "alpaca", "sharegpt", "messages", "prompt_completion"]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class DataSpec(Section):
    source: list[str] = ["builtin:python-docs"]
    """Where raw rows come from: files, globs, folders, `hub:ORG/NAME`, or `builtin:python-docs`."""
    format: Format = "auto"
    """Row format; `auto` looks at the first rows of each file."""
    columns: dict[str, str] = {}
    """Your column names for `prompt`, `completion` and optionally `system`; dots reach into nested values."""
    system_prompt: str | None = None
    """System message for rows that have none; null leaves that to the model's chat template."""
    encoding: str = "auto"
    """Text encoding of the source files (any Python codec name); `auto` finds out, see docs/data.md."""
    delimiter: Annotated[str, Field(pattern=r"^(auto|.)$")] = "auto"
    """Column separator of CSV files; `auto` finds comma, semicolon, tab or bar (.tsv files always use a tab)."""
    engine: Literal["local", "ray"] = "local"
    """What works on the parts of the data: this machine's cores, or a Ray cluster that sees the store (`[ray]`)."""
    hub_split: str = "train"
    """Split to read from a hub data set."""
    packages: list[str] = ["stdlib"]
    """python-docs only: `stdlib`, or names of importable packages and modules."""
    max_lookup_rows: Annotated[int, Field(ge=0)] | None = None
    """python-docs only: most look-up rows (`what does X do?`); null takes all."""
    max_summary_rows: Annotated[int, Field(ge=0)] | None = None
    """python-docs only: most summary rows (source -> docstring), shortest sources first; null takes all."""
    max_rows_per_package: Annotated[int, Field(ge=1)] = 400
    """python-docs only: most rows of each kind from one top-level package, so that none dominates."""


class ContractSpec(Section):
    max_quarantine_rate: Fraction = 0.05
    """Budget of rejected rows, as a share of all rows read; above it the run stops."""
    min_rows: Annotated[int, Field(ge=1)] = 20
    """Fewest rows that must be left after the row rules."""
    max_chars: Annotated[int, Field(ge=1)] = 8000
    """Longest row, all messages together, in characters; longer rows are quarantined. Raise it where
    `train.too_long` shall truncate or split them."""
    max_duplicate_rate: Fraction = 0.5
    """Largest share of exact copies among the rows that passed the rules; above it the run stops."""
    max_length_drift: Fraction = 0.3
    """Kolmogorov-Smirnov distance of prompt or answer lengths to the batch before; above it a warning."""
    max_share_drift: Annotated[float, Field(ge=0.0)] = 0.5
    """Kullback-Leibler divergence (nats) of the shares of sources or languages to the batch before; then a warning."""
    max_label_share: Fraction = 0.9
    """Largest share of one label in a source whose answers are labels; above it a warning."""
    max_label_drift: Annotated[float, Field(ge=0.0)] = 0.25
    """Kullback-Leibler divergence (nats) of a source's labels to the batch before; above it a warning."""
    suite: str = "instruction_rows"
    """Great Expectations suite of the rows: a name in data_contracts/suites/ or a path to a suite's JSON file."""
    batch_suite: str = "instruction_batch"
    """Suite of the batch as a whole: one row of rates and drift."""


class CustomRule(Section):
    """A rule of your own: a row that breaks any of its limits is rejected under `custom`, with this name."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    field: Literal["prompt", "completion", "any"] = "completion"
    forbidden: str | None = None
    required: str | None = None
    allowed: list[str] | None = None
    min_chars: Annotated[int, Field(ge=0)] | None = None
    max_chars: Annotated[int, Field(ge=0)] | None = None


class RulesSpec(Section):
    actions: dict[Reason, Action] = {}
    """What to do about a reason instead of its default: `quarantine`, `flag` (count and keep) or `off`."""
    repair: bool = True
    """Repair mojibake, entities, control characters and white space; every change is recorded."""
    languages: list[str] = []
    """Languages an answer may be in (ISO 639-1: en, zh); empty allows any."""
    personal_data: Literal["mask", "quarantine", "keep"] = "mask"
    """E-mail, phone, card and national id numbers, addresses of machines: masked, or the row rejected, or kept."""
    secrets: Literal["mask", "quarantine", "keep"] = "quarantine"
    """API keys, tokens, private keys."""
    custom: list[CustomRule] = []
    """Rules of your own: name, field, and `forbidden` or `required` regular expression, `allowed` values, lengths."""
    function: Annotated[str, Field(pattern=r"^.+\.py:[A-Za-z_]\w*$")] | None = None
    """`FILE.py:FUNCTION`, called with (prompt, completion); what it returns other than None rejects the row."""

    @model_validator(mode="after")
    def _limits_are_usable(self) -> "RulesSpec":
        for rule in self.custom:
            for pattern in (rule.forbidden, rule.required):
                try:
                    re.compile(pattern or "")
                except re.error as error:
                    raise ValueError(f"rules.custom {rule.name}: not a regular expression: {error}") from error
        fixed = sorted(reason for reason in self.actions if reason in UNREADABLE | LEAKS)
        if fixed:
            raise ValueError(f"rules.actions: {', '.join(fixed)} cannot be kept: there is no conversation, or it leaks")
        return self


class CurateSpec(Section):
    near_duplicate_threshold: Fraction = 0.7
    """Jaccard similarity of word n-grams from which two rows are the same row; 1 keeps all but exact copies."""
    max_near_duplicate_rate: Fraction = 0.5
    """Largest share of near copies among distinct rows; above it the run stops and the ledger learns nothing."""
    shingle_words: Annotated[int, Field(ge=1)] = 5
    """Words in one n-gram (characters in Chinese, Japanese, Korean and Thai). One changed word in 32 is 0.7 with 5."""
    decontaminate: bool = True
    """Take rows out of training that share 8-grams with more than half of a held-out or benchmark item (Tulu 3)."""
    test_fraction: Fraction = 0.1
    """Share of rows held out for the verdict, by hash of the duplicate cluster. Known rows keep their split for ever."""
    max_test_rows: Annotated[int, Field(ge=1)] = 1000
    """Most rows in the test split; once it is full, new rows go to training."""
    validation_fraction: Fraction = 0.02
    """Share of rows whose loss is measured after training, beside the test rows that decide."""
    max_validation_rows: Annotated[int, Field(ge=0)] = 64
    """Most rows in the validation split."""

    @model_validator(mode="after")
    def _some_rows_train(self) -> "CurateSpec":
        if self.test_fraction + self.validation_fraction >= 1.0:
            raise ValueError("test_fraction + validation_fraction must stay below 1: no row would be left to train on")
        return self


class ModelSpec(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "tunegate-model"
    """Name in the MLflow registry, and the scope of the row ledger."""
    base: str = "builtin:smollm2-135m"
    """Base model: `builtin:smollm2-135m`, `builtin:tiny-llama` (random, for tests), a folder, or a hub id."""
    revision: str | None = None
    """Hub revision (commit) of the base; null takes the newest and records which it was."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of weights and arithmetic; `auto` takes bf16 only where the device has it in hardware."""


class TrainSpec(Section):
    methods: Annotated[list[Method], Field(min_length=1)] = ["lora", "qlora"]
    """Arms to train, in this order: `lora`, `qlora`, `full` (every weight), `prefix` (arXiv 2101.00190); see
    docs/methods.md. The verdict needs lora and qlora; of several arms qlora may be released, else lora, else the last."""
    seed: Annotated[int, Field(ge=0)] = 17
    """Seed of the step-0 adapter, of dropout and of the data order: the same for every arm."""
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
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads of a worker; null takes the cores that are free."""
    workers: Annotated[int, Field(ge=1)] = 1
    """Processes that train one arm together, each on a GPU of its own or a share of the cores, see docs/devices.md. A step
    has the same rows, and its gradient is the same but for rounding."""
    engine: Literal["local", "ray"] = "local"
    """Where several workers run: on this machine, or on a Ray cluster that sees the store (`[ray]`)."""
    sharding: Literal["none", "fsdp"] = "none"
    """What each of several workers holds: `none` all weights; `fsdp` a part of every layer, which lets a base train that no
    single GPU holds, and costs traffic between them."""

    @model_validator(mode="after")
    def _dials_fit_together(self) -> "TrainSpec":
        if found := list(refusals(self)):
            raise ValueError("\n".join(found))
        return self


class EvaluateSpec(Section):
    tasks: Annotated[list[str], Field(min_length=1)] = ["domain_nll", "domain_choice"]
    """lm-eval tasks: the two built from the test split, and any lm-eval task whose data can be had."""
    task_folder: str | None = None
    """Folder with lm-eval task files (YAML) of your own, and their data; their names go into `tasks`."""
    max_items: Annotated[int, Field(ge=2)] = 1000
    """Most test rows scored (lowest hash first: the same ones each time)."""
    task_limit: Annotated[int, Field(ge=1)] | None = None
    """Most items of each further lm-eval task; null scores all."""
    batch_tokens: Annotated[int, Field(ge=16)] = 512
    """Most tokens in one forward pass."""
    sample_questions: Annotated[int, Field(ge=0)] = 3
    """Test questions answered by every model, to read beside the numbers."""
    sample_tokens: Annotated[int, Field(ge=1)] = 48
    """Longest sample answer in tokens."""


class GateSpec(Section):
    min_retention: Fraction = 0.95
    """QLoRA must keep at least this share of LoRA's loss gain (lower end of the interval)."""
    max_champion_nll_increase_nats: Annotated[float, Field(ge=0.0)] = 0.02
    """How much worse than the champion a candidate may be, in nats per token: 0.02 is 2 % of perplexity. With 0 a
    candidate that is as good as the champion is never decided."""
    max_accuracy_drop: Fraction | None = None
    """How far QLoRA's accuracy may lie below LoRA's (lower end of the interval); null reports it without a gate."""
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    """Level of every interval."""
    bootstrap_draws: Annotated[int, Field(ge=100)] = 10_000
    """Bootstrap resamples behind each interval."""


class StoreSpec(Section):
    root: str = "mlruns"
    """Folder of everything a run keeps: MLflow's database, artifacts, snapshots, checkpoints, Prefect's state."""
    mlflow_uri: str | None = None
    """MLflow tracking server; null uses the database in `root`."""


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
    store: StoreSpec = StoreSpec()
